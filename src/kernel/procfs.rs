//! `/proc/PID` (proc(5)): tasks, children, status, the small text files.

#![allow(unsafe_code)]

use std::fs;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd};
use std::path::PathBuf;

use nix::unistd::Pid;

/// `/proc/PID/NAME`.
pub fn path(pid: Pid, name: &str) -> PathBuf {
    PathBuf::from(format!("/proc/{pid}/{name}"))
}

/// The TIDs of a process, in no particular order. `ENOENT`: there is no such process.
pub fn tasks(pid: Pid) -> io::Result<Vec<Pid>> {
    numbers(&path(pid, "task"))
}

/// The PIDs that a directory of procfs lists.
pub fn numbers(directory: &std::path::Path) -> io::Result<Vec<Pid>> {
    let mut found = Vec::new();
    for entry in fs::read_dir(directory)? {
        if let Some(number) = entry?
            .file_name()
            .to_str()
            .and_then(|name| name.parse().ok())
        {
            found.push(Pid::from_raw(number));
        }
    }
    Ok(found)
}

/// The children that one thread of a process has made (`CONFIG_PROC_CHILDREN`). Exact only while it is stopped.
pub fn children(pid: Pid, tid: Pid) -> io::Result<Vec<Pid>> {
    let text = fs::read_to_string(format!("/proc/{pid}/task/{tid}/children"))?;
    Ok(text
        .split_ascii_whitespace()
        .filter_map(|word| word.parse().ok())
        .map(Pid::from_raw)
        .collect())
}

/// The command name of a process, for messages; `?` if it is gone.
pub fn comm(pid: Pid) -> String {
    fs::read_to_string(path(pid, "comm")).map_or_else(|_| "?".into(), |text| text.trim_end().into())
}

/// The kernel's stack of a thread that sleeps (`/proc/PID/stack`, needs `CAP_SYS_ADMIN`), a function a line.
pub fn stack(pid: Pid, tid: Pid) -> io::Result<String> {
    fs::read_to_string(format!("/proc/{pid}/task/{tid}/stack"))
}

/// The number, the six arguments, and the stack and instruction pointers of the system call that a thread sleeps in
/// (`/proc/PID/syscall`, needs `CAP_SYS_PTRACE`); `None` if it runs or sleeps in none.
pub fn call(pid: Pid, tid: Pid) -> Option<[u64; 9]> {
    let text = fs::read_to_string(format!("/proc/{pid}/task/{tid}/syscall")).ok()?;
    let mut words = text.split_whitespace();
    let mut found = [0; 9];
    found[0] = words.next()?.parse().ok()?;
    for value in &mut found[1..] {
        *value = u64::from_str_radix(words.next()?.strip_prefix("0x")?, 16).ok()?;
    }
    Some(found)
}

/// Addresses that the kernel keeps of an address space (prctl(2), `PR_SET_MM`): start and end of the code, start of the
/// stack, start and end of the data, start of the heap, start and end of the arguments and of the environment.
pub type Bounds = [u64; 10];

/// The fields of `/proc/PID/stat` (or `/proc/PID/task/TID/stat`) from the third on: state, ppid …
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Stat {
    /// `R`, `S`, `D`, `Z`, `T`, `t`, `X` …
    pub state: char,
    fields: Vec<u64>,
}

impl Stat {
    /// Reads it for a process.
    pub fn read(pid: Pid) -> io::Result<Self> {
        Self::parse(&fs::read_to_string(path(pid, "stat"))?)
    }

    /// Reads it from the file held open.
    pub fn read_held(file: &fs::File) -> io::Result<Self> {
        Self::parse(&String::from_utf8_lossy(&read_held(file)?))
    }

    /// Reads it for one thread.
    pub fn of_thread(pid: Pid, tid: Pid) -> io::Result<Self> {
        Self::parse(&fs::read_to_string(format!("/proc/{pid}/task/{tid}/stat"))?)
    }

    fn parse(text: &str) -> io::Result<Self> {
        let bad = || {
            io::Error::new(
                io::ErrorKind::InvalidData,
                "not the format of /proc/PID/stat",
            )
        };
        // The command name may hold spaces and parentheses.
        let (_, rest) = text.rsplit_once(") ").ok_or_else(bad)?;
        let mut words = rest.split_ascii_whitespace();
        let state = words
            .next()
            .and_then(|word| word.chars().next())
            .ok_or_else(bad)?;
        let fields = words
            .map(|word| word.parse::<i64>().map_or(u64::MAX, |value| value as u64))
            .collect();
        Ok(Self { state, fields })
    }

    /// Field `number` as proc_pid_stat(5) counts them, from 4 (ppid) on; 0 if the kernel does not have it.
    pub fn field(&self, number: usize) -> u64 {
        number
            .checked_sub(4)
            .and_then(|index| self.fields.get(index))
            .copied()
            .unwrap_or(0)
    }

    /// The processor it ran on last.
    pub fn processor(&self) -> usize {
        self.field(39) as usize
    }

    /// PID of the parent.
    pub fn parent(&self) -> Pid {
        Pid::from_raw(self.field(4) as i32)
    }

    /// The session it is in.
    pub fn session(&self) -> Pid {
        Pid::from_raw(self.field(6) as i32)
    }

    /// The process group it is in.
    pub fn group(&self) -> Pid {
        Pid::from_raw(self.field(5) as i32)
    }

    /// Whether its process group or its session has a number.
    pub fn belongs_to(&self, number: Pid) -> bool {
        [self.field(5), self.field(6)].contains(&(number.as_raw() as u64))
    }

    /// The signal its parent gets when it ends.
    pub fn exit_signal(&self) -> i32 {
        self.field(38) as i32
    }

    /// Where its program, its stack, its arguments and its environment lie.
    pub fn bounds(&self) -> Bounds {
        const FIELDS: [usize; 10] = [26, 27, 28, 45, 46, 47, 48, 49, 50, 51];
        FIELDS.map(|number| self.field(number))
    }

    /// When it started, in clock ticks since boot: with the PID it names a process for ever.
    pub fn start_time(&self) -> u64 {
        self.field(22)
    }
}

/// Bytes of a process that are in memory (`/proc/PID/statm`).
pub fn resident_bytes(pid: Pid) -> io::Result<u64> {
    let text = fs::read_to_string(path(pid, "statm"))?;
    let pages = text
        .split_ascii_whitespace()
        .nth(1)
        .and_then(|word| word.parse::<u64>().ok());
    Ok(pages.unwrap_or(0) * 4096)
}

/// Memory that a process shares with no other, in bytes. Walks its page tables.
pub fn own_bytes(pid: Pid) -> io::Result<u64> {
    let text = fs::read_to_string(path(pid, "smaps_rollup"))?;
    let sizes = ["Private_Clean", "Private_Dirty"].map(|key| {
        let line = status_line(&text, key).unwrap_or_default();
        let number = line.split_ascii_whitespace().next();
        number
            .and_then(|word| word.parse::<u64>().ok())
            .unwrap_or(0)
    });
    Ok(sizes.iter().sum::<u64>() * 1024)
}

/// Opens a file or directory below a directory of procfs that is held open, to read.
pub fn open_below(directory: &fs::File, name: &str) -> io::Result<fs::File> {
    let flags = nix::fcntl::OFlag::O_RDONLY | nix::fcntl::OFlag::O_CLOEXEC;
    let mode = nix::sys::stat::Mode::empty();
    let fd = nix::fcntl::openat(Some(directory.as_raw_fd()), name, flags, mode)?;
    // SAFETY: the kernel has just returned this descriptor; nobody else knows it.
    Ok(unsafe { fs::File::from_raw_fd(fd) })
}

/// How many threads a process has, by its `/proc/PID/task` held open: those that are ending count until they are gone.
pub fn thread_count(tasks: &fs::File) -> io::Result<u64> {
    use std::os::unix::fs::MetadataExt;
    // Each thread counts as a subdirectory, `.` and `..` are the others.
    Ok(tasks.metadata()?.nlink().saturating_sub(2))
}

/// As [`read_held`], for files that are text.
pub fn text_held(file: &fs::File) -> io::Result<String> {
    String::from_utf8(read_held(file)?)
        .map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))
}

/// Reads a file of procfs that is held open, from its start. It hands out about a page at a time, so the text is
/// consistent only while the process is stopped.
pub fn read_held(file: &fs::File) -> io::Result<Vec<u8>> {
    use std::os::unix::fs::FileExt;
    let mut text = vec![0; 16 << 10];
    let mut len = 0;
    loop {
        if len == text.len() {
            text.resize(text.len() * 2, 0);
        }
        match file.read_at(&mut text[len..], len as u64)? {
            0 => break,
            got => len += got,
        }
    }
    text.truncate(len);
    Ok(text)
}

/// The value of a line of `/proc/PID/status`, as `Uid`.
pub fn status_line<'a>(status: &'a str, key: &str) -> Option<&'a str> {
    status
        .lines()
        .find_map(|line| line.strip_prefix(key)?.strip_prefix(':'))
        .map(str::trim)
}

/// The PID of a process in its own PID namespace.
pub fn pid_inside(status: &str) -> Option<i32> {
    namespace_pids(status).last().copied()
}

/// Whether a process is the init of a PID namespace below ours.
pub fn is_init_below(status: &str) -> bool {
    let pids = namespace_pids(status);
    pids.len() > 1 && pids.last() == Some(&1)
}

/// The PIDs of a process in every PID namespace it is in, ours first.
pub fn namespace_pids(status: &str) -> Vec<i32> {
    status_line(status, "NSpid")
        .unwrap_or_default()
        .split_ascii_whitespace()
        .filter_map(|word| word.parse().ok())
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stat_survives_a_nasty_name() {
        let stat = Stat::parse("7 (a) R (b) S 1 7 7 0 -1 4194560 0").unwrap();
        assert_eq!((stat.state, stat.parent()), ('S', Pid::from_raw(1)));
        assert_eq!(stat.field(8), u64::MAX);
        assert_eq!(stat.field(50), 0);
        assert!(Stat::parse("nonsense").is_err());
    }

    #[test]
    fn reads_ourselves() {
        let me = Pid::this();
        assert!(tasks(me).unwrap().contains(&me));
        assert_eq!(Stat::read(me).unwrap().parent(), Pid::parent());
        let status = fs::read_to_string(path(me, "status")).unwrap();
        assert_eq!(namespace_pids(&status)[0], me.as_raw());
    }
}
