//! Little-endian numbers, strings and arrays out of a stream whose length is known.

use std::io::{ErrorKind, Read};

use crate::FormatError;

/// Reads forward and knows how many bytes are left, so that no declared length is believed beyond
/// them.
pub(crate) struct Cursor<R> {
    from: R,
    position: u64,
    len: u64,
}

impl<R: Read> Cursor<R> {
    /// `len` is the number of bytes that `from` holds.
    pub(crate) fn new(from: R, len: u64) -> Self {
        Self { from, position: 0, len }
    }

    pub(crate) fn position(&self) -> u64 {
        self.position
    }

    pub(crate) fn left(&self) -> u64 {
        self.len - self.position
    }

    fn take(&mut self, buffer: &mut [u8], what: &str) -> Result<(), FormatError> {
        let wanted = buffer.len() as u64;
        if wanted > self.left() {
            return Err(self.short(what, wanted));
        }
        self.from.read_exact(buffer).map_err(|error| match error.kind() {
            ErrorKind::UnexpectedEof => self.short(what, wanted),
            _ => FormatError::Malformed(format!("reading {what} failed: {error}")),
        })?;
        self.position += wanted;
        Ok(())
    }

    fn short(&self, what: &str, wanted: u64) -> FormatError {
        FormatError::Truncated(format!(
            "{what} at byte {} takes {wanted} bytes, the file has {} left",
            self.position,
            self.left()
        ))
    }

    pub(crate) fn array<const N: usize>(&mut self, what: &str) -> Result<[u8; N], FormatError> {
        let mut bytes = [0; N];
        self.take(&mut bytes, what)?;
        Ok(bytes)
    }

    pub(crate) fn u32(&mut self, what: &str) -> Result<u32, FormatError> {
        self.array(what).map(u32::from_le_bytes)
    }

    pub(crate) fn u64(&mut self, what: &str) -> Result<u64, FormatError> {
        self.array(what).map(u64::from_le_bytes)
    }

    /// A count of things of which each takes at least `each` bytes of the file.
    pub(crate) fn count(&mut self, what: &str, each: u64) -> Result<usize, FormatError> {
        let count = self.u64(what)?;
        self.fitting(what, count, each)
    }

    /// Checks a count that was read elsewhere against the bytes left.
    pub(crate) fn fitting(&self, what: &str, count: u64, each: u64) -> Result<usize, FormatError> {
        match count.checked_mul(each) {
            Some(bytes) if bytes <= self.left() => Ok(count as usize),
            _ => Err(FormatError::Truncated(format!(
                "{what} is {count}, more than the {} bytes left can hold",
                self.left()
            ))),
        }
    }

    pub(crate) fn bytes(&mut self, what: &str, len: usize) -> Result<Vec<u8>, FormatError> {
        if len as u64 > self.left() {
            return Err(self.short(what, len as u64));
        }
        let mut bytes = vec![0; len];
        self.take(&mut bytes, what)?;
        Ok(bytes)
    }

    /// A string with its length before it as u64.
    pub(crate) fn string(&mut self, what: &str) -> Result<String, FormatError> {
        let len = self.count(what, 1)?;
        String::from_utf8(self.bytes(what, len)?)
            .map_err(|_| FormatError::Malformed(format!("{what} is not UTF-8")))
    }
}
