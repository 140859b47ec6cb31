//! Lines on their way to a terminal, a pipe or a file that may take them late or never.
//!
//! Whoever has a line to write puts it in a bounded queue and goes on; a thread of its own writes.
//! What does not fit is dropped and counted, and a line says so as soon as the reader is back.

use std::{
    collections::VecDeque,
    fs::File,
    io::{self, ErrorKind, Write},
    os::fd::AsFd,
    sync::{
        Arc, Condvar, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

/// Bytes that wait to be written.
const WAITING_BYTES_MAX: usize = 1 << 20;
/// After a drop, lines are taken again once no more than this waits: otherwise a slow reader would
/// get a notice with every line.
const RESUME_BYTES: usize = WAITING_BYTES_MAX / 2;
/// What a line costs in memory beside its text.
const LINE_OVERHEAD_BYTES: usize = 64;
/// Before another try, where a descriptor that does not block is full.
const TRY_AGAIN: Duration = Duration::from_millis(10);

/// Makes the line that tells of so many dropped ones.
pub(super) type Notice = Box<dyn Fn(u64) -> Vec<u8> + Send + Sync>;

/// A bounded queue of lines and the thread that writes them.
pub(super) struct Lines {
    queue: Mutex<Queue>,
    /// Something waits to be written.
    filled: Condvar,
    /// Everything is written.
    drained: Condvar,
    dropped: AtomicU64,
    notice: Notice,
}

#[derive(Default)]
struct Queue {
    lines: VecDeque<Vec<u8>>,
    bytes: usize,
    /// A line is being written.
    writing: bool,
    /// Dropped, and not told yet.
    untold: u64,
}

impl Queue {
    fn put(&mut self, line: Vec<u8>) {
        self.bytes += line.len() + LINE_OVERHEAD_BYTES;
        self.lines.push_back(line);
    }

    fn is_drained(&self) -> bool {
        self.lines.is_empty() && !self.writing && self.untold == 0
    }
}

impl Lines {
    /// Starts the thread that writes to `out`, whole lines in order.
    ///
    /// # Errors
    /// The system gives no thread.
    pub fn start(
        name: &str,
        out: impl Write + Send + 'static,
        notice: Notice,
    ) -> io::Result<Arc<Self>> {
        let lines = Arc::new(Self {
            queue: Mutex::default(),
            filled: Condvar::new(),
            drained: Condvar::new(),
            dropped: AtomicU64::new(0),
            notice,
        });
        let own = Arc::clone(&lines);
        thread::Builder::new().name(name.into()).spawn(move || own.write_all(out))?;
        Ok(lines)
    }

    /// Puts a line, its newline included, behind the others, or drops it. Never waits for a reader.
    pub fn put(&self, line: &[u8]) {
        let mut queue = self.queue();
        let limit = if queue.untold > 0 { RESUME_BYTES } else { WAITING_BYTES_MAX };
        if queue.bytes + line.len() + LINE_OVERHEAD_BYTES > limit {
            queue.untold += 1;
            self.dropped.fetch_add(1, Ordering::Relaxed);
            return;
        }
        self.tell_dropped(&mut queue);
        queue.put(line.to_vec());
        drop(queue);
        self.filled.notify_one();
    }

    /// Puts a line that must not be dropped: there are only a few of the kind.
    pub fn put_always(&self, line: &[u8]) {
        let mut queue = self.queue();
        self.tell_dropped(&mut queue);
        queue.put(line.to_vec());
        drop(queue);
        self.filled.notify_one();
    }

    /// Waits until everything is written, or until the deadline.
    pub fn flush(&self, deadline: Instant) {
        let mut queue = self.queue();
        while !queue.is_drained() {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return;
            }
            let waited = self.drained.wait_timeout(queue, left);
            queue = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// Lines that were not written.
    pub fn dropped(&self) -> u64 {
        self.dropped.load(Ordering::Relaxed)
    }

    fn tell_dropped(&self, queue: &mut Queue) {
        if queue.untold > 0 {
            queue.put((self.notice)(queue.untold));
            queue.untold = 0;
        }
    }

    fn queue(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The thread's work, for as long as the process lives.
    fn write_all(&self, mut out: impl Write) {
        loop {
            let line = self.next();
            if write(&mut out, &line).is_err() {
                // Nobody reads any more. There is no place left to say so.
                self.dropped.fetch_add(1, Ordering::Relaxed);
            }
        }
    }

    fn next(&self) -> Vec<u8> {
        let mut queue = self.queue();
        queue.writing = false;
        loop {
            if queue.lines.is_empty() {
                self.tell_dropped(&mut queue);
            }
            if let Some(line) = queue.lines.pop_front() {
                queue.bytes -= line.len() + LINE_OVERHEAD_BYTES;
                queue.writing = true;
                return line;
            }
            self.drained.notify_all();
            queue = self.filled.wait(queue).unwrap_or_else(PoisonError::into_inner);
        }
    }
}

/// A descriptor of our own to the same file: no lock of the standard library is held while a write
/// blocks. Without such a file, lines go nowhere.
pub(super) fn duplicate(of: impl AsFd) -> Box<dyn Write + Send> {
    match of.as_fd().try_clone_to_owned() {
        Ok(descriptor) => Box::new(File::from(descriptor)),
        Err(_) => Box::new(io::sink()),
    }
}

fn write(out: &mut impl Write, mut rest: &[u8]) -> io::Result<()> {
    while !rest.is_empty() {
        match out.write(rest) {
            Ok(0) => return Err(ErrorKind::WriteZero.into()),
            Ok(written) => rest = &rest[written..],
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) if error.kind() == ErrorKind::WouldBlock => thread::sleep(TRY_AGAIN),
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::{
        io::{BufRead, BufReader, PipeReader, PipeWriter, pipe},
        sync::mpsc,
    };

    const LONG: Duration = Duration::from_secs(60);

    fn started() -> (Arc<Lines>, PipeReader) {
        let (reader, writer) = pipe().unwrap();
        (start(writer), reader)
    }

    fn start(writer: PipeWriter) -> Arc<Lines> {
        let notice = Box::new(|lines| format!("dropped {lines}\n").into_bytes());
        Lines::start("log", writer, notice).unwrap()
    }

    /// Puts numbered lines until some were dropped; how many were put.
    fn stall(lines: &Lines) -> usize {
        let padding = "x".repeat(1000);
        let mut put = 0;
        while lines.dropped() < 100 {
            lines.put(format!("{put} {padding}\n").as_bytes());
            put += 1;
        }
        put
    }

    #[test]
    fn a_reader_that_stops_costs_lines_and_never_time() {
        let (lines, _reader) = started();
        let put = stall(&lines);
        assert!(put > WAITING_BYTES_MAX / 2000, "only {put} lines were taken");
        assert!(put < 4 * WAITING_BYTES_MAX / 1000, "{put} lines wait");
        // Would not return before the deadline if it waited for the reader.
        lines.flush(Instant::now() + Duration::from_millis(10));
    }

    #[test]
    fn a_reader_that_comes_back_hears_how_many_are_missing_and_where() {
        let (lines, reader) = started();
        let put = stall(&lines);
        lines.put_always(b"fatal\n");
        let (sender, receiver) = mpsc::channel();
        thread::spawn(move || {
            BufReader::new(reader).lines().map_while(Result::ok).for_each(|line| {
                sender.send(line).unwrap();
            });
        });
        let mut numbers = 0..put - 100;
        loop {
            let line = receiver.recv_timeout(LONG).unwrap();
            if line == "dropped 100" {
                break;
            }
            assert_eq!(line.split(' ').next().unwrap(), numbers.next().unwrap().to_string());
        }
        assert_eq!(numbers.next(), None, "the notice stands where the lines are missing");
        assert_eq!(receiver.recv_timeout(LONG).unwrap(), "fatal");
        lines.flush(Instant::now() + LONG);
        lines.put(b"after\n");
        assert_eq!(receiver.recv_timeout(LONG).unwrap(), "after");
        assert_eq!(lines.dropped(), 100);
    }

    #[test]
    fn the_last_drops_are_told_without_another_line() {
        let (lines, reader) = started();
        stall(&lines);
        let told = BufReader::new(reader).lines().map_while(Result::ok);
        let (sender, receiver) = mpsc::channel();
        thread::spawn(move || {
            let mut told = told;
            sender.send(told.any(|line| line == "dropped 100")).unwrap();
        });
        assert!(receiver.recv_timeout(LONG).unwrap());
    }

    #[test]
    fn a_reader_that_left_is_counted() {
        let (lines, reader) = started();
        drop(reader);
        lines.put(b"one\n");
        lines.flush(Instant::now() + LONG);
        assert_eq!(lines.dropped(), 1);
    }
}
