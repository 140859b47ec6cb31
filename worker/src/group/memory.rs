//! How much memory this process may still take.

use std::{fs, path::Path};

/// What bounds it, and by how much.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Available {
    pub bytes: u64,
    /// Where the figure comes from, for messages.
    pub source: &'static str,
}

/// The least of what the machine and the control group leave; `None` where the system does not say.
pub(super) fn available() -> Option<Available> {
    let machine = read("/proc/meminfo").and_then(|text| meminfo(&text));
    let group = control_group();
    let machine = machine.map(|bytes| Available { bytes, source: "MemAvailable" });
    let group = group.map(|bytes| Available { bytes, source: "the control group's limit" });
    [machine, group].into_iter().flatten().min_by_key(|available| available.bytes)
}

fn read(path: impl AsRef<Path>) -> Option<String> {
    fs::read_to_string(path).ok()
}

/// `MemAvailable` in bytes.
fn meminfo(text: &str) -> Option<u64> {
    let line = text.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kib * 1024)
}

/// What version 2 or version 1 limits leave; a group's cache of files can be taken back and counts
/// as free.
fn control_group() -> Option<u64> {
    let number = |path: String| read(path)?.trim().parse::<u64>().ok();
    let groups = read("/proc/self/cgroup")?;
    let left = |limit: u64, used: u64, stat: Option<String>, key: &str| {
        let cache = stat.and_then(|text| {
            let line = text.lines().find_map(|line| line.strip_prefix(key).map(str::to_owned))?;
            line.trim().parse::<u64>().ok()
        });
        limit.saturating_sub(used.saturating_sub(cache.unwrap_or(0)))
    };
    let second = groups.lines().find_map(|line| line.strip_prefix("0::")).and_then(|path| {
        let folder = format!("/sys/fs/cgroup{}", path.trim_end_matches('/'));
        let limit = number(format!("{folder}/memory.max"))?;
        let used = number(format!("{folder}/memory.current"))?;
        Some(left(limit, used, read(format!("{folder}/memory.stat")), "inactive_file "))
    });
    let first = || {
        let folder = "/sys/fs/cgroup/memory";
        let limit = number(format!("{folder}/memory.limit_in_bytes"))?;
        let used = number(format!("{folder}/memory.usage_in_bytes"))?;
        let stat = read(format!("{folder}/memory.stat"));
        Some(left(limit, used, stat, "total_inactive_file "))
    };
    second.or_else(first)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn meminfo_is_read_in_bytes() {
        let text = "MemTotal:  100 kB\nMemAvailable:   24 kB\nBuffers: 1 kB\n";
        assert_eq!(meminfo(text), Some(24 * 1024));
        assert_eq!(meminfo("MemTotal: 100 kB\n"), None);
        assert_eq!(meminfo("MemAvailable: many kB\n"), None);
    }

    #[test]
    fn this_machine_says_how_much_it_has() {
        assert!(available().is_some_and(|available| available.bytes > 0));
    }
}
