//! One rank's part of a group that exchanges by NCCL.
//!
//! No call waits for other ranks inside the library; what is in progress is asked after until a
//! deadline. A communicator that failed once is aborted and refuses all further work: the library
//! promises nothing about it, and its kernels leave the device only then.

use super::library::{BFLOAT16, Comm, Config, FLOAT32, IN_PROGRESS, Nccl, SUCCESS, SUM, UniqueId};
use crate::Driver;
use kernels::KernelError;
use std::{
    collections::VecDeque,
    ffi::{c_int, c_void},
    ptr,
    sync::mpsc::channel,
    thread,
    time::{Duration, Instant},
};

/// Aborting may hang itself; then it is left behind.
const ABORT_LIMIT: Duration = Duration::from_secs(5);
/// Asking again and again goes on for so long, then sleeps come between.
const SPIN: Duration = Duration::from_millis(2);
const POLL: Duration = Duration::from_micros(50);

/// How long a rank waits for the others.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NcclLimits {
    /// When they meet, and in calls before the first [`Communicator::check`], which make
    /// connections.
    pub first: Duration,
    /// In later calls.
    pub usual: Duration,
}

/// A rank's place in its group.
#[derive(Clone, Copy, Debug)]
pub struct NcclPlace {
    pub rank: usize,
    pub ranks: usize,
    /// The same on every rank.
    pub id: UniqueId,
}

/// f32 on their way between two ranks; both sides name as many.
#[derive(Clone, Copy, Debug)]
pub(super) enum Part {
    Send { from: u64, len: usize, to: usize },
    Receive { to: u64, len: usize, from: usize },
}

/// What the library has of a group; null before it meets.
struct Handle(Comm);

// SAFETY: the library takes a communicator from any thread, one call at a time.
unsafe impl Send for Handle {}

/// A rank among those of a group. Dropping it aborts it: that is local, where an orderly end waits
/// for every other rank. Whoever drops it has waited for its work, or given it up.
pub struct Communicator<D: Driver> {
    library: Nccl,
    /// `Err` with the first failure once it is aborted.
    handle: Result<Handle, String>,
    rank: usize,
    ranks: usize,
    limits: NcclLimits,
    warm: bool,
    /// Read behind the work of a step, to wait for it.
    behind: D::Memory,
    /// Of steps that were not checked, the oldest first.
    unchecked: VecDeque<D::Reading>,
}

impl<D: Driver> Communicator<D> {
    /// Meets the other ranks; all do so at once, each with a device of its own.
    ///
    /// # Errors
    /// `KernelError::Device` in the library's words, or where a rank does not come in time;
    /// the driver's own.
    pub fn meet(
        driver: &D,
        library: Nccl,
        place: NcclPlace,
        limits: NcclLimits,
    ) -> Result<Self, KernelError> {
        const WHAT: &str = "meeting the other ranks";
        let NcclPlace { rank, ranks, id } = place;
        let behind = driver.zeroed("NCCL", size_of::<u32>())?;
        // The library takes the device that is current.
        driver.stream()?;
        let mut comm = ptr::null_mut();
        let mut config = Config::unblocking();
        let (of, at) = (index(ranks)?, index(rank)?);
        // SAFETY: writes a handle; the configuration is laid out and marked as nccl.h says.
        let result = unsafe { (library.init_rank)(&mut comm, of, id, at, &mut config) };
        let handle = Ok(Handle(comm));
        let unchecked = VecDeque::new();
        let mut met = Self { library, handle, rank, ranks, limits, warm: false, behind, unchecked };
        met.settle(WHAT, result, limits.first)?;
        Ok(met)
    }

    pub fn rank(&self) -> usize {
        self.rank
    }

    pub fn ranks(&self) -> usize {
        self.ranks
    }

    /// A step's exchanges have been launched.
    ///
    /// # Errors
    /// The driver's own.
    pub fn end_step(&mut self, driver: &D) -> Result<(), KernelError> {
        self.unchecked.push_back(driver.begin_read(&self.behind, 0, size_of::<u32>())?);
        Ok(())
    }

    /// Whether every exchange has come about up to the oldest [`Self::end_step`] that was not
    /// checked; waits for that.
    ///
    /// # Errors
    /// `KernelError::Device` in the library's words where the exchange has failed; the driver's own
    /// where the device does not finish: a rank is missing then, or the device has failed.
    pub fn check(&mut self, driver: &D) -> Result<(), KernelError> {
        const WHAT: &str = "exchanging";
        // Before the wait, which would not end, and behind it.
        let state = self.state(self.comm()?);
        self.settle(WHAT, state, self.limit())?;
        if self.unchecked.is_empty() {
            self.end_step(driver)?;
        }
        let reading = self.unchecked.pop_front();
        if let Some(Err(error)) = reading.map(|reading| driver.end_read(reading)) {
            let text = format!("{error}; another rank may have missed an exchange by NCCL");
            return Err(self.fail(text));
        }
        let state = self.state(self.comm()?);
        self.settle(WHAT, state, self.limit())?;
        self.warm = true;
        Ok(())
    }

    /// x = the sum of every rank's `len` numbers in bf16.
    pub(super) fn all_reduce(
        &mut self,
        x: u64,
        len: usize,
        stream: *mut c_void,
    ) -> Result<(), KernelError> {
        let (comm, at) = (self.comm()?, x as *mut c_void);
        // SAFETY: the communicator is alive and the device current; addresses are the caller's
        // promise.
        let result = unsafe { (self.library.all_reduce)(at, at, len, BFLOAT16, SUM, comm, stream) };
        self.settle("a sum", result, self.limit())
    }

    /// All `parts` at once; a rank may send to itself.
    pub(super) fn exchange(
        &mut self,
        parts: impl Iterator<Item = Part>,
        stream: *mut c_void,
    ) -> Result<(), KernelError> {
        const WHAT: &str = "an exchange of columns";
        let comm = self.comm()?;
        // SAFETY: opens a group of this thread's, which is closed below.
        let mut result = unsafe { (self.library.group_start)() };
        for part in parts {
            let given = self.give(part, comm, stream);
            // What is still in progress shows at the end of the group.
            if given != SUCCESS && given != IN_PROGRESS && result == SUCCESS {
                result = given;
            }
        }
        // SAFETY: closes the group that was opened.
        let ended = unsafe { (self.library.group_end)() };
        self.settle(WHAT, if result == SUCCESS { ended } else { result }, self.limit())
    }

    fn give(&self, part: Part, comm: Comm, stream: *mut c_void) -> c_int {
        let library = &self.library;
        // SAFETY: as for a sum. Ranks are fewer than those that have met.
        unsafe {
            match part {
                Part::Send { from, len, to } => {
                    (library.send)(from as *const c_void, len, FLOAT32, to as c_int, comm, stream)
                }
                Part::Receive { to, len, from } => {
                    let to = to as *mut c_void;
                    (library.receive)(to, len, FLOAT32, from as c_int, comm, stream)
                }
            }
        }
    }

    fn limit(&self) -> Duration {
        if self.warm { self.limits.usual } else { self.limits.first }
    }

    fn comm(&self) -> Result<Comm, KernelError> {
        match &self.handle {
            Ok(Handle(comm)) => Ok(*comm),
            Err(first) => Err(KernelError::Device(format!("NCCL is out of use since: {first}"))),
        }
    }

    /// How far the last call has come.
    fn state(&self, comm: Comm) -> c_int {
        let mut state = SUCCESS;
        // SAFETY: the communicator is alive; writes a number.
        match unsafe { (self.library.async_error)(comm, &mut state) } {
            SUCCESS => state,
            failed => failed,
        }
    }

    /// Waits until a call that said `result` is done.
    fn settle(&mut self, what: &str, result: c_int, limit: Duration) -> Result<(), KernelError> {
        let comm = self.comm()?;
        let (start, mut state) = (Instant::now(), result);
        while state == IN_PROGRESS {
            let waited = start.elapsed();
            if waited > limit {
                let limit = limit.as_secs_f64();
                let text = format!("NCCL: {what} took longer than {limit} s: is a rank missing?");
                return Err(self.fail(text));
            }
            if waited < SPIN {
                thread::yield_now()
            } else {
                thread::sleep(POLL)
            }
            state = self.state(comm);
        }
        match state {
            SUCCESS => Ok(()),
            failed => Err(self.fail(self.library.failed(what, failed, comm))),
        }
    }

    /// Aborts it for this reason.
    fn fail(&mut self, text: String) -> KernelError {
        let text = match self.abort() {
            None => text,
            Some(trouble) => format!("{text}; {trouble}"),
        };
        self.handle = Err(text.clone());
        KernelError::Device(text)
    }

    /// Gives the group up on a thread of its own; what went wrong.
    fn abort(&mut self) -> Option<String> {
        let handle = std::mem::replace(&mut self.handle, Err("it was given up".into())).ok()?;
        if handle.0.is_null() {
            return None;
        }
        let library = self.library;
        let (sender, ended) = channel();
        let body = move || {
            // All of it: a handle may go to a thread, its pointer may not.
            let handle = handle;
            // SAFETY: the communicator is alive, and nobody calls it any more.
            let result = unsafe { (library.abort)(handle.0) };
            // Nobody listens any more where it took too long.
            let _late = sender.send(result);
        };
        if let Err(error) = thread::Builder::new().name("nccl-abort".into()).spawn(body) {
            return Some(format!("it was not aborted: {error}"));
        }
        match ended.recv_timeout(ABORT_LIMIT) {
            Ok(SUCCESS) => None,
            Ok(failed) => Some(self.library.failed("aborting", failed, ptr::null_mut())),
            Err(_) => Some(format!("aborting it has not ended within {} s", ABORT_LIMIT.as_secs())),
        }
    }
}

impl<D: Driver> Drop for Communicator<D> {
    fn drop(&mut self) {
        // Nobody is left to hear of trouble: what the group still holds, the process's end gives
        // back.
        let _trouble = self.abort();
    }
}

fn index(number: usize) -> Result<c_int, KernelError> {
    c_int::try_from(number).map_err(|_| KernelError::Device(format!("there is no rank {number}")))
}
