//! Launches that are kept and run again. A launch whose argument points into memory that was given
//! back since is an error, whatever lies there now.

use super::{
    Emulator,
    launch::{Begun, Order},
    product,
};
use cuda::{Gemm, Launch};
use kernels::KernelError;
use std::{
    collections::{BTreeMap, VecDeque},
    sync::{Mutex, MutexGuard, PoisonError},
};

/// Allocations by their first address: bytes, and a number that no other has.
static ALIVE: Mutex<BTreeMap<u64, (usize, u64)>> = Mutex::new(BTreeMap::new());

fn alive() -> MutexGuard<'static, BTreeMap<u64, (usize, u64)>> {
    ALIVE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Memory begins to live.
pub(super) fn taken(start: u64, bytes: usize, number: u64) {
    alive().insert(start, (bytes, number));
}

/// Memory is given back.
pub(super) fn given_back(start: u64) {
    alive().remove(&start);
}

/// The allocation that `address` points into: its start and its number.
fn allocation(address: u64) -> Option<(u64, u64)> {
    let alive = alive();
    let (&start, &(bytes, number)) = alive.range(..=address).next_back()?;
    (address < start + bytes.max(1) as u64).then_some((start, number))
}

/// One launch or product.
#[derive(Clone)]
enum Work {
    Kernel {
        name: String,
        grid: [u32; 3],
        threads: u32,
        shared: u32,
        dependent: bool,
        /// In words, so that they lie as arguments must.
        args: Vec<u64>,
        args_len: usize,
    },
    Product(Gemm),
}

impl Work {
    fn name(&self) -> &str {
        match self {
            Self::Kernel { name, .. } => name,
            Self::Product(_) => "a product",
        }
    }

    fn is_dependent(&self) -> bool {
        matches!(self, Self::Kernel { dependent: true, .. })
    }

    fn words(&self) -> Vec<u64> {
        match self {
            Self::Kernel { args, .. } => args.clone(),
            Self::Product(Gemm { out, x, weight, scales, bias, .. }) => {
                let scales = scales.map(|scales| [scales.x, scales.weight]);
                let more = scales.into_iter().flatten().chain(*bias);
                [*out, *x, *weight].into_iter().chain(more).collect()
            }
        }
    }
}

/// What was captured.
pub struct Graph {
    work: Vec<Work>,
    /// Of each, what its arguments point into.
    uses: Vec<Vec<(u64, u64)>>,
}

impl Graph {
    /// Names of the kernels, in order; products are "a product".
    pub fn kernels(&self) -> Vec<String> {
        self.work.iter().map(|work| work.name().to_owned()).collect()
    }
}

/// What is captured at the moment, where something is.
#[derive(Default)]
pub(super) struct Capture(Mutex<Option<Vec<Work>>>);

impl Capture {
    fn held(&self) -> MutexGuard<'_, Option<Vec<Work>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// # Errors
    /// While launches are captured.
    pub fn refuse(&self, what: &str) -> Result<(), KernelError> {
        match &*self.held() {
            Some(_) => Err(KernelError::Device(format!("{what} while launches are captured"))),
            None => Ok(()),
        }
    }

    pub fn begin(&self) -> Result<(), KernelError> {
        self.refuse("a capture")?;
        *self.held() = Some(Vec::new());
        Ok(())
    }

    pub fn end(&self) -> Result<Graph, KernelError> {
        let work = self.held().take();
        let work = work.ok_or_else(|| KernelError::Device("no capture to end".into()))?;
        let uses = |work: &Work| work.words().into_iter().filter_map(allocation).collect();
        Ok(Graph { uses: work.iter().map(uses).collect(), work })
    }

    /// Keeps the launch where launches are captured; whether it did.
    pub fn keeps(&self, launch: &Launch<'_>) -> bool {
        let mut held = self.held();
        let Some(work) = &mut *held else { return false };
        let (from, args_len) = launch.args();
        let mut args = vec![0u64; args_len.div_ceil(8)];
        // SAFETY: the launch has as many bytes of arguments, and so has the copy.
        unsafe { args.as_mut_ptr().cast::<u8>().copy_from_nonoverlapping(from.cast(), args_len) };
        let Launch { kernel, grid, threads, shared, dependent, .. } = *launch;
        let name = kernel.into();
        work.push(Work::Kernel { name, grid, threads, shared, dependent, args, args_len });
        true
    }

    /// As [`Self::keeps`].
    pub fn keeps_product(&self, gemm: &Gemm) -> bool {
        let mut held = self.held();
        let Some(work) = &mut *held else { return false };
        work.push(Work::Product(*gemm));
        true
    }
}

impl Emulator {
    /// As a device that captures nothing.
    #[must_use]
    pub fn without_capture(mut self) -> Self {
        self.captures = false;
        self
    }

    /// Dependent launches begin as early as they may on a device that has room for all of them,
    /// but no more than [`AHEAD`] do.
    pub(super) fn run(&self, graph: &Graph) -> Result<(), KernelError> {
        self.capture.refuse("a graph")?;
        let (mut begun, mut rest) = (VecDeque::new(), graph.work.iter().zip(&graph.uses));
        let mut next = rest.next();
        loop {
            while let Some((work, uses)) = next
                && (begun.is_empty() || begun.len() <= AHEAD && work.is_dependent())
            {
                check_alive(work, uses)?;
                begun.push_back(self.begin_work(work, !begun.is_empty())?);
                next = rest.next();
            }
            match begun.pop_front() {
                Some(Turn::Launch(launch)) => launch.end()?,
                Some(Turn::Product(gemm)) => product::run(gemm)?,
                None => return Ok(()),
            }
        }
    }

    fn begin_work<'a>(&'a self, work: &'a Work, ahead: bool) -> Result<Turn<'a>, KernelError> {
        match work {
            Work::Kernel { name, grid, threads, shared, dependent, args, args_len } => {
                let args = (args.as_ptr().cast(), *args_len);
                let (threads, shared, dependent) = (*threads, *shared, *dependent);
                let order = Order { name, grid: *grid, threads, shared, dependent, args };
                self.begin(&order, ahead).map(Turn::Launch)
            }
            Work::Product(gemm) => Ok(Turn::Product(gemm)),
        }
    }
}

/// Dependent launches that begin before the one whose turn it is ends.
const AHEAD: usize = 2;

/// Work of a graph that waits for its turn.
enum Turn<'a> {
    Launch(Begun<'a>),
    Product(&'a Gemm),
}

fn check_alive(work: &Work, uses: &[(u64, u64)]) -> Result<(), KernelError> {
    let gone =
        uses.iter().find(|(start, number)| alive().get(start).is_none_or(|(_, is)| is != number));
    let Some((start, _)) = gone else { return Ok(()) };
    let name = work.name();
    Err(KernelError::Device(format!("{name} of a graph uses memory at {start:#x} that is gone")))
}
