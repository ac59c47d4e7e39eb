//! The process that a keeper is asked to keep: identified beyond doubt, and one that can be kept.

use std::fs;
use std::io::{self, Read};
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use super::StateDirectory;

/// Set in a kernel thread's flags, field 9 of `/proc/PID/stat` (`include/linux/sched.h`).
const PF_KTHREAD: u64 = 0x0020_0000;

/// The hidden verb under which a keeper runs, as it shows in its command line.
pub(crate) const KEEPER_VERB: &str = "keeper";

/// Why a process cannot be the root of a tree to keep.
#[derive(Debug, thiserror::Error)]
pub enum TargetError {
    /// No process has this PID.
    #[error("there is no process {0}")]
    Missing(i32),
    /// The process has exited and waits for its parent, or its PID was given to another.
    #[error("process {0} has exited")]
    Dead(i32),
    /// A PID must be positive.
    #[error("{0} is not a PID")]
    Invalid(i32),
    /// The number is that of a thread.
    #[error("{tid} is a thread of process {pid}: give --pid {pid}")]
    Thread {
        /// The number given.
        tid: i32,
        /// The thread's process.
        pid: i32,
    },
    /// Kernel threads have no state of their own.
    #[error("process {pid} ({comm}) is a kernel thread: only programs can be kept")]
    KernelThread {
        /// Its PID.
        pid: i32,
        /// Its name.
        comm: String,
    },
    /// The tree would hold this very program.
    #[error(
        "process {pid} ({comm}) is {relation}: a tree that holds snapback itself cannot be kept"
    )]
    Ourselves {
        /// Its PID.
        pid: i32,
        /// Its name.
        comm: String,
        /// What it is to us.
        relation: &'static str,
    },
    /// `/proc` could not be read.
    #[error("cannot look at process {pid}: {error}")]
    Proc {
        /// Its PID.
        pid: i32,
        /// What the kernel said.
        error: io::Error,
    },
}

/// A process, told from all others that ever had its PID by its start time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Identity {
    /// PID in our own PID namespace.
    pub pid: i32,
    /// Start time in clock ticks since boot, field 22 of `/proc/PID/stat` (proc_pid_stat(5)).
    pub start_time: u64,
}

impl Identity {
    /// Looks a process up: enough to find its keeper, at the price of one file read.
    ///
    /// # Errors
    ///
    /// There is no such process, or it has exited.
    pub fn look_up(pid: i32) -> Result<Identity, TargetError> {
        if pid <= 0 {
            return Err(TargetError::Invalid(pid));
        }
        let stat = Stat::read(pid)?;
        if stat.is_dead() {
            return Err(TargetError::Dead(pid));
        }
        let start_time = stat.start_time;
        Ok(Identity { pid, start_time })
    }

    /// Looks a process up and checks that it can be the root of a tree to keep.
    ///
    /// # Errors
    ///
    /// [`TargetError`] says why it cannot.
    pub fn of(pid: i32) -> Result<Identity, TargetError> {
        let found = Identity::look_up(pid)?;
        let stat = Stat::read(pid)?;
        let tgid = thread_group(pid)?;
        if tgid != pid {
            return Err(TargetError::Thread {
                tid: pid,
                pid: tgid,
            });
        }
        if stat.flags & PF_KTHREAD != 0 {
            return Err(TargetError::KernelThread {
                pid,
                comm: stat.comm,
            });
        }
        if let Some(relation) = relation_to_us(pid)? {
            return Err(TargetError::Ourselves {
                pid,
                comm: stat.comm,
                relation,
            });
        }
        Ok(found)
    }

    /// Whether the process that this was taken from still lives.
    ///
    /// # Errors
    ///
    /// `/proc` could not be read.
    pub fn is_alive(self) -> Result<bool, TargetError> {
        match Stat::read(self.pid) {
            Ok(stat) => Ok(stat.start_time == self.start_time && !stat.is_dead()),
            Err(TargetError::Missing(_)) => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// The root of a tree by its PID: the process that has that, or, if that is not kept, one of which a keeper below the
    /// root directory `root` still has checkpoints though it has ended.
    ///
    /// # Errors
    ///
    /// There is no such process, or it has exited, and no keeper has checkpoints of it.
    pub fn kept(root: &Path, pid: i32) -> Result<Identity, TargetError> {
        let kept = StateDirectory::of_pid(root, pid);
        let living = Identity::look_up(pid);
        match living {
            Ok(living) if kept.is_empty() || kept.contains(&living) => Ok(living),
            _ => kept
                .into_iter()
                .max_by_key(|identity| identity.start_time)
                .map_or(living, Ok),
        }
    }

    /// What [`Identity::key`] was made of.
    pub(super) fn from_key(key: &str) -> Option<Identity> {
        let (pid, start_time) = key.strip_prefix("pid-")?.split_once('-')?;
        Some(Identity {
            pid: pid.parse().ok()?,
            start_time: start_time.parse().ok()?,
        })
    }

    /// The name of the keeper's directory for this process.
    pub fn key(self) -> String {
        format!("pid-{}-{}", self.pid, self.start_time)
    }
}

/// The fields of `/proc/PID/stat` that are used here.
struct Stat {
    comm: String,
    state: char,
    parent: i32,
    flags: u64,
    start_time: u64,
}

impl Stat {
    fn read(pid: i32) -> Result<Stat, TargetError> {
        let text = read(pid, "stat")?;
        Stat::parse(&text).ok_or_else(|| TargetError::Proc {
            pid,
            error: io::Error::new(
                io::ErrorKind::InvalidData,
                "unexpected form of /proc/PID/stat",
            ),
        })
    }

    /// The name is in parentheses and may itself hold any character, parentheses too.
    fn parse(text: &str) -> Option<Stat> {
        let (open, close) = (text.find('(')?, text.rfind(')')?);
        let comm = text.get(open + 1..close)?.to_owned();
        let fields: Vec<&str> = text[close + 1..].split_ascii_whitespace().collect();
        Some(Stat {
            comm,
            state: fields.first()?.chars().next()?,
            parent: fields.get(1)?.parse().ok()?,
            flags: fields.get(6)?.parse().ok()?,
            start_time: fields.get(19)?.parse().ok()?,
        })
    }

    /// A zombie, or about to be none.
    fn is_dead(&self) -> bool {
        matches!(self.state, 'Z' | 'X')
    }
}

fn read(pid: i32, file: &str) -> Result<String, TargetError> {
    let failed = |error: io::Error| match error.raw_os_error() {
        Some(libc::ENOENT | libc::ESRCH) => TargetError::Missing(pid),
        _ => TargetError::Proc { pid, error },
    };
    let mut bytes = Vec::with_capacity(4096);
    fs::File::open(format!("/proc/{pid}/{file}"))
        .and_then(|mut file| file.read_to_end(&mut bytes))
        .map_err(failed)?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

fn thread_group(pid: i32) -> Result<i32, TargetError> {
    let status = read(pid, "status")?;
    let tgid = status
        .lines()
        .find_map(|line| line.strip_prefix("Tgid:")?.trim().parse().ok());
    tgid.ok_or(TargetError::Missing(pid))
}

/// What the process is to this one, if its tree would hold us or a keeper.
fn relation_to_us(pid: i32) -> Result<Option<&'static str>, TargetError> {
    let own = nix::unistd::getpid().as_raw();
    if pid == own {
        return Ok(Some("this very process"));
    }
    let mut ancestor = Stat::read(own)?.parent;
    while ancestor > 0 {
        if ancestor == pid {
            return Ok(Some("an ancestor of this process"));
        }
        match Stat::read(ancestor) {
            Ok(stat) => ancestor = stat.parent,
            Err(TargetError::Missing(_)) => break,
            Err(error) => return Err(error),
        }
    }
    Ok(is_keeper(pid).then_some("a keeper of snapback"))
}

fn is_keeper(pid: i32) -> bool {
    let Ok(line) = fs::read(format!("/proc/{pid}/cmdline")) else {
        return false;
    };
    let mut arguments = line.split(|byte| *byte == 0);
    let is_verb = arguments.any(|argument| argument == KEEPER_VERB.as_bytes());
    let file = |path: &str| fs::metadata(path).map(|meta| (meta.dev(), meta.ino())).ok();
    is_verb && file(&format!("/proc/{pid}/exe")) == file("/proc/self/exe")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stat_with_a_hostile_name() {
        let text = "7 (a) S 1 (b)) R 3 7 7 0 -1 4194560 0 0 0 0 0 0 0 0 20 0 1 0 991 0 0";
        let stat = Stat::parse(text).unwrap();
        assert_eq!(stat.comm, "a) S 1 (b)");
        let rest = (stat.state, stat.parent, stat.flags, stat.start_time);
        assert_eq!(rest, ('R', 3, 4_194_560, 991));
    }

    #[test]
    fn bad_roots_are_named() {
        let own = nix::unistd::getpid().as_raw();
        let parent = nix::unistd::getppid().as_raw();
        let relation = |pid| match Identity::of(pid) {
            Err(TargetError::Ourselves { relation, .. }) => relation,
            other => panic!("{other:?}"),
        };
        assert_eq!(relation(own), "this very process");
        assert_eq!(relation(parent), "an ancestor of this process");
        assert!(matches!(
            Identity::of(i32::MAX),
            Err(TargetError::Missing(_))
        ));
        assert!(matches!(Identity::of(0), Err(TargetError::Invalid(0))));
        assert!(matches!(
            Identity::of(2),
            Err(TargetError::KernelThread { .. })
        ));
    }

    #[test]
    fn a_thread_is_not_a_process() {
        let (send, receive) = std::sync::mpsc::channel();
        let (done, wait) = std::sync::mpsc::channel::<()>();
        let thread = std::thread::spawn(move || {
            send.send(nix::unistd::gettid().as_raw()).unwrap();
            let _ = wait.recv();
        });
        let tid = receive.recv().unwrap();
        assert!(matches!(Identity::of(tid), Err(TargetError::Thread { .. })));
        drop(done);
        thread.join().unwrap();
    }

    #[test]
    fn a_dead_process_is_dead() {
        let mut child = std::process::Command::new("sleep")
            .arg("1000")
            .spawn()
            .unwrap();
        let pid = child.id() as i32;
        let identity = Identity::of(pid).unwrap();
        assert!(identity.is_alive().unwrap());
        child.kill().unwrap();
        child.wait().unwrap();
        assert!(!identity.is_alive().unwrap());
    }
}
