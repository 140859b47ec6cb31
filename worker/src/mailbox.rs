//! Where a sequence's updates wait for their reader.
//!
//! The engine must never wait for a slow client, and a slow client must not make a queue grow:
//! updates that were not fetched yet become one. What waits here is bounded by the prompt and
//! `max_tokens`.

use std::sync::{
    Arc, Mutex, MutexGuard, PoisonError,
    atomic::{AtomicBool, Ordering},
};

use engine::{Position, Update};
use tokio::sync::Notify;

use crate::WorkerError;

#[derive(Default)]
struct Slot {
    pending: Option<Update>,
    /// Set when the group failed before the sequence ended.
    failure: Option<String>,
    /// The last update was put in.
    ended: bool,
    position: Position,
    /// The sequence got its place in the batch, and the reader does not know yet.
    admitted: bool,
}

/// What both ends share.
#[derive(Default)]
pub(crate) struct Mailbox {
    slot: Mutex<Slot>,
    bell: Notify,
    reader_gone: AtomicBool,
}

impl Mailbox {
    /// Both ends of a new mailbox, for a sequence that stands at `position`.
    pub fn open(position: Position) -> (Delivery, Output) {
        let slot = Mutex::new(Slot { position, ..Slot::default() });
        let mailbox = Arc::new(Self { slot, ..Self::default() });
        (Delivery(Arc::clone(&mailbox)), Output { mailbox })
    }

    fn slot(&self) -> MutexGuard<'_, Slot> {
        self.slot.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The engine's end. Dropped before the last update, it tells the reader that the engine is gone.
pub(crate) struct Delivery(Arc<Mailbox>);

impl Delivery {
    pub fn put(&self, update: Update) {
        let mut slot = self.0.slot();
        slot.ended = update.end.is_some();
        match &mut slot.pending {
            Some(pending) => pending.merge(update),
            None => slot.pending = Some(update),
        }
        drop(slot);
        self.0.bell.notify_one();
    }

    /// The group is lost: after what already waits, the reader gets the reason.
    pub fn fail(&self, reason: &str) {
        let mut slot = self.0.slot();
        if !slot.ended {
            slot.failure.get_or_insert_with(|| reason.to_owned());
        }
        drop(slot);
        self.0.bell.notify_one();
    }

    pub fn set_position(&self, position: Position) {
        let mut slot = self.0.slot();
        let admitted = position.running && !slot.position.running;
        slot.admitted |= admitted;
        slot.position = position;
        drop(slot);
        if admitted {
            self.0.bell.notify_one();
        }
    }

    /// Whether nobody will read any more.
    pub fn is_abandoned(&self) -> bool {
        self.0.reader_gone.load(Ordering::Acquire)
    }
}

impl Drop for Delivery {
    fn drop(&mut self) {
        self.fail("the engine has stopped");
    }
}

/// What a reader hears.
#[derive(Debug)]
pub enum News {
    /// All that came since the last call, in order.
    Update(Update),
    /// The sequence got its place in the batch: told before the first step that it is in.
    Admitted,
}

/// The reader's end of one sequence. Dropping it cancels the sequence.
pub struct Output {
    mailbox: Arc<Mailbox>,
}

impl Output {
    /// What there is; waits while there is nothing. `None` after the update that carries the end.
    /// Cancel safe.
    pub async fn next(&mut self) -> Option<Result<News, WorkerError>> {
        loop {
            let rung = self.mailbox.bell.notified();
            {
                let mut slot = self.mailbox.slot();
                let admitted = std::mem::take(&mut slot.admitted);
                if let Some(update) = slot.pending.take() {
                    return Some(Ok(News::Update(update)));
                }
                if admitted {
                    return Some(Ok(News::Admitted));
                }
                if let Some(reason) = slot.failure.take() {
                    slot.ended = true;
                    return Some(Err(WorkerError::Group(reason)));
                }
                if slot.ended {
                    return None;
                }
            }
            rung.await;
        }
    }
}

impl Output {
    /// How far the sequence had come when the engine last said.
    pub fn position(&self) -> Position {
        self.mailbox.slot().position
    }
}

impl Drop for Output {
    fn drop(&mut self) {
        self.mailbox.reader_gone.store(true, Ordering::Release);
    }
}
