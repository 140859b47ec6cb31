//! What the operating system says of this process, read from `/proc` where there is one.

use std::{fs, path::Path, sync::OnceLock};

/// Clock ticks in a second, as `/proc` counts them on every Linux that Rust runs on.
const TICKS: f64 = 100.0;

/// One look at this process.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Usage {
    pub cpu_seconds: f64,
    pub resident_bytes: u64,
    pub virtual_bytes: u64,
    pub threads: u64,
    /// Unix time of the start.
    pub start_seconds: f64,
    pub open_fds: u64,
    /// `u64::MAX` where there is no limit.
    pub max_fds: u64,
}

/// `None` where the system does not tell.
pub(crate) fn usage() -> Option<Usage> {
    static BOOT: OnceLock<Option<f64>> = OnceLock::new();
    let text = |name: &str| fs::read_to_string(Path::new("/proc").join(name)).ok();
    let boot = *BOOT.get_or_init(|| boot_seconds(&text("stat")?));
    let files = fs::read_dir("/proc/self/fd").ok()?.count();
    let parts = (text("self/stat")?, text("self/status")?, text("self/limits")?);
    // The look itself has the folder open.
    parse(&parts.0, &parts.1, &parts.2, (boot?, files.saturating_sub(1) as u64))
}

fn parse(stat: &str, status: &str, limits: &str, (boot, open_fds): (f64, u64)) -> Option<Usage> {
    // The name, in parentheses, may contain anything; the third field comes after it.
    let fields: Vec<&str> = stat.rsplit_once(')')?.1.split_whitespace().collect();
    let field = |number: usize| fields.get(number - 3)?.parse::<u64>().ok();
    let resident = status.lines().find_map(|line| line.strip_prefix("VmRSS:"))?;
    let resident: u64 = resident.split_whitespace().next()?.parse().ok()?;
    let files = limits.lines().find_map(|line| line.strip_prefix("Max open files"))?;
    let max_fds = match files.split_whitespace().next()? {
        "unlimited" => u64::MAX,
        number => number.parse().ok()?,
    };
    Some(Usage {
        cpu_seconds: (field(14)? + field(15)?) as f64 / TICKS,
        resident_bytes: resident * 1024,
        virtual_bytes: field(23)?,
        threads: field(20)?,
        start_seconds: boot + field(22)? as f64 / TICKS,
        open_fds,
        max_fds,
    })
}

/// Unix time at which the machine started.
fn boot_seconds(stat: &str) -> Option<f64> {
    stat.lines().find_map(|line| line.strip_prefix("btime "))?.trim().parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::{SystemTime, UNIX_EPOCH};

    #[test]
    fn fields_are_found_behind_any_name() {
        let stat = "7 (a) b (c) S 1 7 7 0 -1 4194560 1 2 3 4 150 50 6 7 20 0 12 0 1000 4096 25 0";
        let status = "Name:\ta\nVmRSS:\t      100 kB\nThreads:\t12\n";
        let limits = "Limit  Soft Limit  Hard Limit  Units\nMax open files  1024  4096  files\n";
        let usage = parse(stat, status, limits, (50.0, 9)).unwrap();
        let wanted = Usage {
            cpu_seconds: 2.0,
            resident_bytes: 102_400,
            virtual_bytes: 4096,
            threads: 12,
            start_seconds: 60.0,
            open_fds: 9,
            max_fds: 1024,
        };
        assert_eq!(usage, wanted);
        assert_eq!(parse("7 (a) S 1", status, limits, (50.0, 9)), None);
    }

    #[test]
    #[cfg(target_os = "linux")]
    fn this_process_has_memory_files_and_a_start() {
        let usage = usage().unwrap();
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs_f64();
        assert!(usage.resident_bytes > 100_000 && usage.open_fds >= 1, "{usage:?}");
        let age = now - usage.start_seconds;
        assert!((-5.0..86400.0).contains(&age), "{age} s old: {usage:?}");
    }
}
