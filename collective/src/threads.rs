//! Ranks that are threads of one process exchange through shared memory.
//!
//! Each rank posts what it brings to operation `k` in one of two slots and raises its progress
//! counter; others wait for that counter, spinning briefly before they sleep. A slot is used again
//! two operations later, which every rank must have finished reading by then, so one wait serves
//! each operation. A rank that is dropped, unwinds or fails takes the group with it: whoever waits
//! for it learns at once.

use super::{CollectiveError, HostCollective};
use std::{
    hint,
    sync::{
        Arc, Condvar, Mutex, PoisonError, RwLock,
        atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering::SeqCst},
    },
    thread,
    time::{Duration, Instant},
};

/// Patience of `all_gather_cols` and `all_reduce_sum`.
const DATA_DEADLINE: Duration = Duration::from_secs(30);
/// How long a rank looks for the others before it sleeps: ranks in step meet within this.
const SPIN: Duration = Duration::from_micros(100);
const SPINS_PER_YIELD: u32 = 64;
/// Two operations may be under way: one being read, one being posted.
const SLOTS: u64 = 2;

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Kind {
    #[default]
    Broadcast,
    Gather,
    Reduce,
    GatherBytes,
}

/// What one rank brings to one operation.
#[derive(Default)]
struct Slot {
    kind: Kind,
    bytes: Vec<u8>,
    floats: Vec<f32>,
}

/// One rank as the others see it, on cache lines of its own.
#[repr(align(128))]
#[derive(Default)]
struct Seat {
    /// 2 k - 1 once operation k (from 1) is posted, 2 k once this rank is done with it.
    progress: AtomicU64,
    gone: AtomicBool,
    slots: [RwLock<Slot>; SLOTS as usize],
}

struct Meeting {
    seats: Vec<Seat>,
    sleepers: AtomicUsize,
    bell: Mutex<()>,
    rung: Condvar,
}

impl Meeting {
    /// Makes sleeping ranks look again.
    fn ring(&self) {
        if self.sleepers.load(SeqCst) > 0 {
            drop(self.bell.lock().unwrap_or_else(PoisonError::into_inner));
            self.rung.notify_all();
        }
    }
}

/// One rank of a group of threads.
pub struct Threads {
    rank: usize,
    /// Operations begun.
    operation: u64,
    data_deadline: Duration,
    failed: Option<CollectiveError>,
    shared: Arc<Meeting>,
}

impl Threads {
    /// Every rank of a new group, in order.
    pub fn group(world_size: usize) -> Vec<Self> {
        Self::group_with_deadline(world_size, DATA_DEADLINE)
    }

    /// As `group`; no rank waits longer than `data_deadline` for another's data.
    pub fn group_with_deadline(world_size: usize, data_deadline: Duration) -> Vec<Self> {
        let shared = Arc::new(Meeting {
            seats: (0..world_size).map(|_| Seat::default()).collect(),
            sleepers: AtomicUsize::new(0),
            bell: Mutex::new(()),
            rung: Condvar::new(),
        });
        let rank = |rank| {
            let shared = Arc::clone(&shared);
            Self { rank, operation: 0, data_deadline, failed: None, shared }
        };
        (0..world_size).map(rank).collect()
    }

    fn slot(&self, rank: usize) -> &RwLock<Slot> {
        &self.shared.seats[rank].slots[(self.operation % SLOTS) as usize]
    }

    /// Runs one operation; a failure is this rank's last.
    fn operate(
        &mut self,
        run: impl FnOnce(&Self) -> Result<(), CollectiveError>,
    ) -> Result<(), CollectiveError> {
        if let Some(failed) = &self.failed {
            return Err(failed.clone());
        }
        self.operation += 1;
        let outcome = run(self);
        match &outcome {
            Ok(()) => self.progress(2 * self.operation),
            Err(error) => {
                self.failed = Some(error.clone());
                self.leave();
            }
        }
        outcome
    }

    fn progress(&self, to: u64) {
        self.shared.seats[self.rank].progress.store(to, SeqCst);
        self.shared.ring();
    }

    fn leave(&self) {
        self.shared.seats[self.rank].gone.store(true, SeqCst);
        self.shared.ring();
    }

    /// Puts this rank's share where others find it, once the slot's last readers are done.
    fn post(
        &self,
        op: &'static str,
        deadline: Duration,
        fill: impl FnOnce(&mut Slot),
    ) -> Result<(), CollectiveError> {
        let reused = 2 * self.operation.saturating_sub(SLOTS);
        for rank in 0..self.world_size() {
            self.wait_for(rank, reused, op, deadline)?;
        }
        fill(&mut self.slot(self.rank).write().unwrap_or_else(PoisonError::into_inner));
        self.progress(2 * self.operation - 1);
        Ok(())
    }

    /// Waits for the share of `rank` in this operation and looks at it.
    fn fetch<T>(
        &self,
        rank: usize,
        (op, kind): (&'static str, Kind),
        deadline: Duration,
        look: impl FnOnce(&Slot) -> Result<T, CollectiveError>,
    ) -> Result<T, CollectiveError> {
        self.wait_for(rank, 2 * self.operation - 1, op, deadline)?;
        let slot = self.slot(rank).read().unwrap_or_else(PoisonError::into_inner);
        if slot.kind != kind {
            let theirs = slot.kind;
            let detail = format!("rank {rank} is at {theirs:?}, rank {} at {kind:?}", self.rank);
            return Err(CollectiveError::Mismatch(detail));
        }
        look(&slot)
    }

    fn wait_for(
        &self,
        rank: usize,
        progress: u64,
        op: &'static str,
        deadline: Duration,
    ) -> Result<(), CollectiveError> {
        let seat = &self.shared.seats[rank];
        let arrived = || seat.progress.load(SeqCst) >= progress;
        let mut since = None;
        loop {
            for _ in 0..SPINS_PER_YIELD {
                if arrived() {
                    return Ok(());
                }
                hint::spin_loop();
            }
            let start = *since.get_or_insert_with(Instant::now);
            // What the rank posted before it left still counts.
            if seat.gone.load(SeqCst) {
                return if arrived() { Ok(()) } else { Err(CollectiveError::Gone { rank }) };
            }
            let waited = start.elapsed();
            if waited >= deadline {
                return Err(CollectiveError::Deadline { op, rank, seconds: deadline.as_secs() });
            }
            if waited < SPIN {
                thread::yield_now();
            } else {
                self.sleep(seat, progress, deadline - waited);
            }
        }
    }

    /// Sleeps until `seat` made progress or left, at most for `limit`.
    fn sleep(&self, seat: &Seat, progress: u64, limit: Duration) {
        self.shared.sleepers.fetch_add(1, SeqCst);
        let bell = self.shared.bell.lock().unwrap_or_else(PoisonError::into_inner);
        let waiting = |_: &mut ()| seat.progress.load(SeqCst) < progress && !seat.gone.load(SeqCst);
        drop(self.shared.rung.wait_timeout_while(bell, limit, waiting));
        self.shared.sleepers.fetch_sub(1, SeqCst);
    }
}

impl Drop for Threads {
    fn drop(&mut self) {
        self.leave();
    }
}

impl HostCollective for Threads {
    fn rank(&self) -> usize {
        self.rank
    }

    fn world_size(&self) -> usize {
        self.shared.seats.len()
    }

    fn broadcast(
        &mut self,
        bytes: &mut Vec<u8>,
        deadline: Duration,
    ) -> Result<(), CollectiveError> {
        const OP: &str = "broadcast";
        if self.world_size() == 1 {
            return Ok(());
        }
        self.operate(|group| {
            if group.rank == 0 {
                return group.post(OP, deadline, |slot| {
                    slot.kind = Kind::Broadcast;
                    slot.bytes.clone_from(bytes);
                });
            }
            group.fetch(0, (OP, Kind::Broadcast), deadline, |slot| {
                bytes.clone_from(&slot.bytes);
                Ok(())
            })
        })
    }

    fn all_gather_cols(
        &mut self,
        mine: &[f32],
        cols: &[usize],
        all: &mut [f32],
    ) -> Result<(), CollectiveError> {
        const OP: &str = "all_gather_cols";
        let ranks = self.world_size();
        if ranks == 1 {
            return super::take_cols(all, mine, cols, (0, ranks));
        }
        self.operate(|group| {
            let deadline = group.data_deadline;
            group.post(OP, deadline, |slot| slot.share(Kind::Gather, mine))?;
            super::take_cols(all, mine, cols, (group.rank, ranks))?;
            for rank in (0..ranks).filter(|&rank| rank != group.rank) {
                group.fetch(rank, (OP, Kind::Gather), deadline, |slot| {
                    super::take_cols(all, &slot.floats, cols, (rank, ranks))
                })?;
            }
            Ok(())
        })
    }

    fn all_reduce_sum(&mut self, values: &mut [f32]) -> Result<(), CollectiveError> {
        const OP: &str = "all_reduce_sum";
        if self.world_size() == 1 {
            return Ok(());
        }
        self.operate(|group| {
            let deadline = group.data_deadline;
            group.post(OP, deadline, |slot| slot.share(Kind::Reduce, values))?;
            // Two numbers have the same sum in either order: the own share need not be read again.
            let pair = group.world_size() == 2;
            for rank in 0..group.world_size() {
                if pair && rank == group.rank {
                    continue;
                }
                group.fetch(rank, (OP, Kind::Reduce), deadline, |slot| {
                    super::take_share(values, &slot.floats, rank, rank == 0 && !pair)
                })?;
            }
            Ok(())
        })
    }

    fn all_gather_bytes(&mut self, mine: &[u8]) -> Result<Vec<Vec<u8>>, CollectiveError> {
        const OP: &str = "all_gather_bytes";
        let mut all = vec![mine.to_vec(); self.world_size()];
        if all.len() == 1 {
            return Ok(all);
        }
        self.operate(|group| {
            let deadline = group.data_deadline;
            group.post(OP, deadline, |slot| {
                slot.kind = Kind::GatherBytes;
                slot.bytes.clear();
                slot.bytes.extend_from_slice(mine);
            })?;
            for (rank, theirs) in all.iter_mut().enumerate() {
                group.fetch(rank, (OP, Kind::GatherBytes), deadline, |slot| {
                    theirs.clone_from(&slot.bytes);
                    Ok(())
                })?;
            }
            Ok(())
        })?;
        Ok(all)
    }
}

impl Slot {
    fn share(&mut self, kind: Kind, floats: &[f32]) {
        self.kind = kind;
        self.floats.clear();
        self.floats.extend_from_slice(floats);
    }
}
