//! Typed device memory.

use super::Driver;
use kernels::{KernelError, ShapeError};

/// How an array's numbers are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Element {
    Bf16,
    F32,
}

impl Element {
    pub fn bytes(self) -> usize {
        match self {
            Self::Bf16 => 2,
            Self::F32 => 4,
        }
    }
}

/// Device memory with a length.
pub struct Array<D: Driver> {
    pub(super) memory: D::Memory,
    bytes: usize,
}

impl<D: Driver> Array<D> {
    /// Zeroed.
    ///
    /// # Errors
    /// `KernelError::Memory` where there is not enough.
    pub fn zeroed(driver: &D, what: &'static str, bytes: usize) -> Result<Self, KernelError> {
        Ok(Self { memory: driver.zeroed(what, bytes)?, bytes })
    }

    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// The device's address of the first byte.
    pub fn address(&self, driver: &D) -> u64 {
        driver.address(&self.memory)
    }

    /// Writes from the start on.
    ///
    /// # Errors
    /// `KernelError::Shape` where the bytes do not fit; the driver's own.
    pub fn write(&self, driver: &D, bytes: &[u8]) -> Result<(), KernelError> {
        fits("write", bytes.len(), self.bytes)?;
        driver.write(&self.memory, 0, bytes)
    }

    /// Reads from the start on.
    ///
    /// # Errors
    /// `KernelError::Shape` where there are fewer bytes; the driver's own.
    pub fn read(&self, driver: &D, to: &mut [u8]) -> Result<(), KernelError> {
        fits("read", to.len(), self.bytes)?;
        driver.read(to, &self.memory, 0)
    }
}

fn fits(op: &'static str, wanted: usize, room: usize) -> Result<(), ShapeError> {
    kernels::shape::ensure(op, wanted <= room, || format!("{wanted} bytes of an array of {room}"))
}

/// Activations, tables, logits.
pub struct Floats<D: Driver> {
    pub(super) array: Array<D>,
    pub(super) element: Element,
}

impl<D: Driver> Floats<D> {
    /// `len` zeros.
    ///
    /// # Errors
    /// `KernelError::Memory` where there is not enough.
    pub fn zeroed(driver: &D, len: usize, element: Element) -> Result<Self, KernelError> {
        let array = Array::zeroed(driver, "activations", len.saturating_mul(element.bytes()))?;
        Ok(Self { array, element })
    }

    /// Elements it has room for.
    pub fn len(&self) -> usize {
        self.array.bytes() / self.element.bytes()
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    pub fn element(&self) -> Element {
        self.element
    }

    /// The device's address of the first element.
    pub fn address(&self, driver: &D) -> u64 {
        self.array.address(driver)
    }

    /// Writes from the start on, rounded to nearest even where the array is bf16.
    ///
    /// # Errors
    /// `KernelError::Shape` where the values do not fit; the driver's own.
    pub fn write(&self, driver: &D, values: &[f32]) -> Result<(), KernelError> {
        let mut bytes = vec![0; values.len() * self.element.bytes()];
        match self.element {
            Element::F32 => {
                let places = bytes.as_chunks_mut::<4>().0;
                places.iter_mut().zip(values).for_each(|(to, v)| *to = v.to_le_bytes());
            }
            Element::Bf16 => {
                let places = bytes.as_chunks_mut::<2>().0;
                let round = |v: &f32| half::bf16::from_f32(*v).to_le_bytes();
                places.iter_mut().zip(values).for_each(|(to, v)| *to = round(v));
            }
        }
        self.array.write(driver, &bytes)
    }

    /// Reads from the start on.
    ///
    /// # Errors
    /// `KernelError::Shape` where there are fewer values; the driver's own.
    pub fn read(&self, driver: &D, to: &mut [f32]) -> Result<(), KernelError> {
        let mut bytes = vec![0; to.len() * self.element.bytes()];
        self.array.read(driver, &mut bytes)?;
        match self.element {
            Element::F32 => {
                let values = bytes.as_chunks::<4>().0;
                to.iter_mut().zip(values).for_each(|(to, v)| *to = f32::from_le_bytes(*v));
            }
            Element::Bf16 => {
                let values = bytes.as_chunks::<2>().0;
                to.iter_mut()
                    .zip(values)
                    .for_each(|(to, v)| *to = half::bf16::from_le_bytes(*v).to_f32());
            }
        }
        Ok(())
    }
}

/// Indices.
pub struct Ints<D: Driver>(Array<D>);

impl<D: Driver> Ints<D> {
    /// `len` zeros.
    ///
    /// # Errors
    /// `KernelError::Memory` where there is not enough.
    pub fn zeroed(driver: &D, len: usize) -> Result<Self, KernelError> {
        Ok(Self(Array::zeroed(driver, "indices", len.saturating_mul(size_of::<i32>()))?))
    }

    /// The device's address of the first element.
    pub fn address(&self, driver: &D) -> u64 {
        self.0.address(driver)
    }

    /// Writes from the start on.
    ///
    /// # Errors
    /// `KernelError::Shape` where the values do not fit; the driver's own.
    pub fn write(&self, driver: &D, values: &[i32]) -> Result<(), KernelError> {
        let bytes: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
        self.0.write(driver, &bytes)
    }

    /// Reads from the start on.
    ///
    /// # Errors
    /// `KernelError::Shape` where there are fewer values; the driver's own.
    pub fn read(&self, driver: &D, to: &mut [i32]) -> Result<(), KernelError> {
        let mut bytes = vec![0; size_of_val(to)];
        self.0.read(driver, &mut bytes)?;
        let values = bytes.as_chunks::<4>().0;
        to.iter_mut().zip(values).for_each(|(to, v)| *to = i32::from_le_bytes(*v));
        Ok(())
    }
}
