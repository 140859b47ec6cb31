//! Processes that work is left to: their lines as they come, an end to each, and another one behind
//! the work that one of them did not survive.

use serde_json::Value;
use std::{
    io::{BufRead, BufReader, Write},
    os::unix::process::CommandExt,
    process::{Child, Command, ExitStatus, Stdio},
    sync::mpsc::{Receiver, RecvTimeoutError, channel},
    thread,
    time::{Duration, Instant},
};

/// What a process of this program ends with where the device does not work any more, though there
/// was more to do.
pub const BROKEN: u8 = 3;

#[derive(Clone, Copy)]
pub struct Limits {
    pub end: Instant,
    /// Between two lines.
    pub silence: Duration,
}

/// How a process ended.
pub enum Ended {
    By(ExitStatus),
    /// It was ended, for this reason.
    Killed(String),
}

/// Hands out its lines until it ends or a limit is passed; then it is ended, and all that it has
/// started with it.
pub fn run(
    command: &mut Command,
    input: &str,
    limits: Limits,
    mut each: impl FnMut(&str),
) -> Result<Ended, String> {
    // A group of its own, so that what it starts ends with it.
    let command = command.stdin(Stdio::piped()).stdout(Stdio::piped()).process_group(0);
    let mut child =
        command.spawn().map_err(|error| format!("{command:?} does not start: {error}"))?;
    let lines = lines(&mut child)?;
    let mut stdin = child.stdin.take().ok_or("a pipe was asked for")?;
    // A process that ends without reading it says more by its end.
    drop(stdin.write_all(input.as_bytes()));
    drop(stdin);
    let ended = loop {
        let left = limits.end.saturating_duration_since(Instant::now());
        match lines.recv_timeout(left.min(limits.silence)) {
            Ok(line) => each(&line),
            // It has closed its output: now it ends, or hangs.
            Err(RecvTimeoutError::Disconnected) => break end(&mut child)?,
            Err(RecvTimeoutError::Timeout) => {
                kill(&mut child)?;
                let why = match left < limits.silence {
                    true => "its time was over".into(),
                    false => format!("nothing for {} s", limits.silence.as_secs()),
                };
                break Ended::Killed(why);
            }
        }
    };
    reap(&mut child)?;
    // What it said last.
    lines.try_iter().for_each(|line| each(&line));
    Ok(ended)
}

fn lines(child: &mut Child) -> Result<Receiver<String>, String> {
    let output = child.stdout.take().ok_or("a pipe was asked for")?;
    let (send, receive) = channel();
    thread::spawn(move || {
        for line in BufReader::new(output).split(b'\n').map_while(Result::ok) {
            if send.send(String::from_utf8_lossy(&line).into_owned()).is_err() {
                break;
            }
        }
    });
    Ok(receive)
}

/// A driver may hang while it takes leave of its device.
const END: Duration = Duration::from_secs(20);

fn end(child: &mut Child) -> Result<Ended, String> {
    if let Some(status) = ended(child, END)? {
        return Ok(Ended::By(status));
    }
    kill(child)?;
    Ok(Ended::Killed("it hung at its end".into()))
}

fn ended(child: &mut Child, within: Duration) -> Result<Option<ExitStatus>, String> {
    let start = Instant::now();
    loop {
        let status = child.try_wait().map_err(|error| error.to_string())?;
        if status.is_some() || start.elapsed() > within {
            return Ok(status);
        }
        thread::sleep(Duration::from_millis(10));
    }
}

/// A process that was ended inside its driver may stay there: then it is left behind.
fn reap(child: &mut Child) -> Result<(), String> {
    ended(child, Duration::from_secs(3)).map(|_| ())
}

fn kill(child: &mut Child) -> Result<(), String> {
    // Of the whole group.
    let signal = format!("kill -9 -{}", child.id());
    let done = Command::new("sh").args(["-c", &signal]).status();
    if !done.is_ok_and(|status| status.success()) {
        child.kill().map_err(|error| error.to_string())?;
    }
    Ok(())
}

/// How often a process may end without having done anything, and the time between.
const ATTEMPTS: u32 = 3;
const PAUSE: Duration = Duration::from_secs(2);

/// Has all work done, by as many processes as it takes. `command` makes one that leaves out so many
/// of the first pieces and ends at the limit by itself; `each` gets every line, and one with an
/// error for work that its process did not survive. Answers why not all was done, or how a process
/// ended that should not have ended so, though its work was.
pub fn every(
    command: impl Fn(usize) -> Command,
    limits: Limits,
    mut each: impl FnMut(&Line),
) -> Result<Option<String>, String> {
    let (mut done, mut idle) = (0, 0);
    loop {
        let (mut begun, mut all, before) = (None, false, done);
        let ended = run(&mut command(done), "", limits, |line| {
            let line = Line::read(line);
            match &line {
                Line::Begins(name) => begun = Some(name.clone()),
                Line::Done { .. } => (begun, done) = (None, done + 1),
                Line::Ends => all = true,
                _ => {}
            }
            each(&line);
        })?;
        let (right, how) = match ended {
            // 1: all was done, and not all of it was right.
            Ended::By(status) => (matches!(status.code(), Some(0 | 1)), status.to_string()),
            Ended::Killed(why) => (false, why),
        };
        if all {
            return Ok((!right).then_some(how));
        }
        if let Some(name) = begun {
            let error = Some(format!("its process ended: {how}"));
            each(&Line::Done { name, error, value: Value::Null });
            done += 1;
        }
        if Instant::now() >= limits.end {
            return Ok(Some("its time was over".into()));
        }
        // The device may still be busy with the end of the process before.
        idle = if done == before { idle + 1 } else { 0 };
        if idle == ATTEMPTS {
            return Err(format!("a process ended before it had done anything: {how}"));
        }
        if idle > 0 {
            thread::sleep(PAUSE);
        }
    }
}

/// What a process of this program says.
pub enum Line {
    Begins(String),
    Done {
        name: String,
        error: Option<String>,
        value: Value,
    },
    Skipped(String),
    /// There is no more.
    Ends,
    /// JSON of another kind.
    Told(Value),
    /// Not this program's: a sanitizer's.
    Other(String),
}

impl Line {
    fn read(line: &str) -> Self {
        let Ok(value) = serde_json::from_str::<Value>(line) else {
            return Self::Other(line.to_owned());
        };
        let text = |key: &str| value.get(key).and_then(Value::as_str).map(str::to_owned);
        if let Some(name) = text("begins") {
            return Self::Begins(name);
        }
        if value["ends"] == true {
            return Self::Ends;
        }
        match text("name") {
            Some(name) if value["skipped"] == true => Self::Skipped(name),
            Some(name) => Self::Done { name, error: text("error"), value },
            None => Self::Told(value),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn limits(end: u64, silence: u64) -> Limits {
        let silence = Duration::from_millis(silence);
        Limits { end: Instant::now() + Duration::from_millis(end), silence }
    }

    /// Pieces 0 to 4; what a process does at piece N of those it is asked for, the first being
    /// `$1`.
    fn work(at: &str) -> impl Fn(usize) -> Command {
        let script = format!(
            "n=$1; while [ $n -lt 5 ]; do echo '{{\"begins\":\"'$n'\"}}'; case $n in {at} esac; \
             echo '{{\"name\":\"'$n'\"}}'; n=$((n+1)); done; echo '{{\"ends\":true}}'"
        );
        move |skip| {
            let mut command = Command::new("sh");
            command.args(["-c", &script, "sh", &skip.to_string()]);
            command
        }
    }

    type Told = Vec<(String, Option<String>)>;

    fn told(
        command: impl Fn(usize) -> Command,
        limits: Limits,
    ) -> (Result<Option<String>, String>, Told) {
        let mut told = Vec::new();
        let result = every(command, limits, |line| {
            if let Line::Done { name, error, .. } = line {
                told.push((name.clone(), error.clone()));
            }
        });
        (result, told)
    }

    fn names(told: &Told) -> String {
        told.iter()
            .map(|(name, error)| format!("{name}{}", if error.is_some() { "!" } else { "" }))
            .collect()
    }

    #[test]
    fn work_that_its_process_does_not_survive_is_told_and_the_rest_is_done() {
        let (result, done) = told(work("1) kill -SEGV $$;; 3) exit 7;;"), limits(20_000, 20_000));
        assert_eq!((result, names(&done)), (Ok(None), "01!23!4".into()));
        assert!(done[1].1.as_ref().is_some_and(|error| error.contains("signal")), "{done:?}");
    }

    #[test]
    fn work_that_hangs_is_ended_with_all_that_it_started() {
        let start = Instant::now();
        let (result, done) = told(work("2) sleep 100 & sleep 100;;"), limits(20_000, 300));
        assert_eq!((result, names(&done)), (Ok(None), "012!34".into()));
        let (result, done) = told(work("0) sleep 100 & exec sleep 100;;"), limits(300, 20_000));
        let over = Ok(Some("its time was over".to_owned()));
        assert_eq!((result, names(&done)), (over, "0!".into()));
        assert!(start.elapsed() < Duration::from_secs(15));
    }

    #[test]
    fn what_a_process_started_ends_with_it() {
        let (mut command, mut started) = (Command::new("sh"), String::new());
        let command = command.args(["-c", "sleep 100 & echo $!; wait"]);
        let ended = run(command, "", limits(300, 20_000), |line| started += line);
        assert!(matches!(ended, Ok(Ended::Killed(_))));
        let start = Instant::now();
        // Gone, or waiting for its new parent to ask how it ended.
        let gone = || match std::fs::read_to_string(format!("/proc/{started}/stat")) {
            Ok(stat) => stat.contains(") Z "),
            Err(_) => true,
        };
        while !gone() {
            assert!(start.elapsed() < Duration::from_secs(10), "{started} runs on");
            thread::sleep(Duration::from_millis(10));
        }
    }

    #[test]
    fn a_process_that_never_begins_or_ends_oddly_is_told() {
        let never = |_| Command::new("false");
        let (result, done) = told(never, limits(20_000, 20_000));
        assert!(result.is_err_and(|error| error.contains("before it had done anything")));
        assert!(done.is_empty());
        let (result, done) = told(work("4) trap 'exit 9' EXIT;;"), limits(20_000, 20_000));
        assert!(result.is_ok_and(|odd| odd.is_some_and(|how| how.contains('9'))));
        assert_eq!(names(&done), "01234");
    }
}
