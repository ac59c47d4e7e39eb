//! Numbers of `/proc`: what must stay flat, and who is where.

use std::collections::BTreeMap;
use std::fs;

/// A process's place in the family, from `/proc/PID/stat` (proc_pid_stat(5)).
#[derive(Debug, Clone)]
pub(crate) struct Stat {
    /// State letter, as `S` or `Z`.
    pub(crate) state: char,
    /// Parent.
    pub(crate) parent: i32,
    /// Process group.
    pub(crate) group: i32,
}

/// Reads one process's stat; `None` if it is gone.
pub(crate) fn stat(pid: i32) -> Option<Stat> {
    let text = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let fields: Vec<&str> = text.rsplit_once(')')?.1.split_whitespace().collect();
    Some(Stat {
        state: fields.first()?.chars().next()?,
        parent: fields.get(1)?.parse().ok()?,
        group: fields.get(2)?.parse().ok()?,
    })
}

/// All processes there are.
pub(crate) fn processes() -> BTreeMap<i32, Stat> {
    fs::read_dir("/proc")
        .expect("listing /proc")
        .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok())
        .filter_map(|pid| Some((pid, stat(pid)?)))
        .collect()
}

/// Whether the process exists and is not a zombie.
pub(crate) fn is_alive(pid: i32) -> bool {
    stat(pid).is_some_and(|stat| stat.state != 'Z' && stat.state != 'X')
}

/// What one process holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Holdings {
    /// Open descriptors.
    pub(crate) descriptors: usize,
    /// Resident memory in KiB.
    pub(crate) resident_kib: u64,
    /// Lines of `/proc/PID/maps`.
    pub(crate) mappings: usize,
    /// Threads.
    pub(crate) threads: usize,
}

/// Reads what a process holds; `None` if it is gone.
pub(crate) fn holdings(pid: i32) -> Option<Holdings> {
    Some(Holdings {
        descriptors: fs::read_dir(format!("/proc/{pid}/fd")).ok()?.count(),
        resident_kib: status_number(pid, "VmRSS")?,
        mappings: fs::read_to_string(format!("/proc/{pid}/maps"))
            .ok()?
            .lines()
            .count(),
        threads: fs::read_dir(format!("/proc/{pid}/task")).ok()?.count(),
    })
}

/// A number of `/proc/PID/status`.
pub(crate) fn status_number(pid: i32, name: &str) -> Option<u64> {
    let text = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let line = text
        .lines()
        .find(|line| line.split(':').next() == Some(name))?;
    line.split_whitespace().nth(1)?.parse().ok()
}

/// Whether the task is blocked in `read` of descriptor 0, as fixture programs are between commands.
pub(crate) fn reads_commands(pid: i32) -> bool {
    fs::read_to_string(format!("/proc/{pid}/syscall")).is_ok_and(|text| text.starts_with("0 0x0 "))
}

/// Processes whose command line has this word in it.
pub(crate) fn with_argument(word: &str) -> Vec<i32> {
    processes()
        .into_keys()
        .filter(|pid| {
            fs::read(format!("/proc/{pid}/cmdline"))
                .is_ok_and(|line| String::from_utf8_lossy(&line).contains(word))
        })
        .collect()
}
