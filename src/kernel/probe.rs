//! What this kernel offers of what snapback stands on, found by trying, and what it means if something is missing.
#![allow(unsafe_code)]

use std::fs;
use std::net::{TcpListener, TcpStream};
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, SealFlag, fcntl};
use nix::sys::memfd::{MemFdCreateFlag, memfd_create};
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::waitpid;
use nix::unistd::{ForkResult, Pid, fork, getpid, pause};
use serde::Serialize;

use super::inode_changes::InodeChanges;
use super::pagemap::{self, Backing, Scan};
use super::proc_events::ProcEvents;
use super::sock_diag::SockDiag;
use super::userfaultfd::{USER_MODE_ONLY, WriteTracker};
use super::{kcmp, latency, pidfd, procfs, ptrace, remote_memory};

/// One thing that snapback needs of the kernel.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Feature {
    /// Its name, as the kernel's documentation has it.
    pub name: &'static str,
    /// Whether nothing works without it.
    pub mandatory: bool,
    /// Whether it is there.
    pub present: bool,
    /// What was found, or the error met.
    pub detail: String,
    /// What it means if it is missing.
    pub consequence: &'static str,
}

/// Tries everything. Makes a child process for the time, and a connection to itself on the loopback interface.
///
/// # Errors
///
/// The child could not be made.
pub fn probe() -> Result<Vec<Feature>, Errno> {
    let subject = Subject::start()?;
    let try_one = |test: &Test| {
        let (present, detail) = match (test.run)(&subject) {
            Ok(detail) => (true, detail),
            Err(detail) => (false, detail),
        };
        let Test {
            name,
            mandatory,
            consequence,
            ..
        } = *test;
        Feature {
            name,
            mandatory,
            present,
            detail,
            consequence,
        }
    };
    Ok(TESTS.iter().map(try_one).collect())
}

/// A test's detail: of what is there, or why it is not.
type Outcome = Result<String, String>;

struct Test {
    name: &'static str,
    mandatory: bool,
    consequence: &'static str,
    run: fn(&Subject) -> Outcome,
}

const fn needs(
    name: &'static str,
    consequence: &'static str,
    run: fn(&Subject) -> Outcome,
) -> Test {
    Test {
        name,
        mandatory: true,
        consequence,
        run,
    }
}

const fn wants(
    name: &'static str,
    consequence: &'static str,
    run: fn(&Subject) -> Outcome,
) -> Test {
    Test {
        name,
        mandatory: false,
        consequence,
        run,
    }
}

const NOTHING_WORKS: &str = "no checkpoints";

const TESTS: &[Test] = &[
    needs("x86-64, Linux 6.7", NOTHING_WORKS, kernel_version),
    needs(
        "CAP_SYS_PTRACE",
        "no process of another user can be stopped",
        |_| capability(19),
    ),
    needs(
        "CAP_SYS_ADMIN",
        "seccomp filters cannot be suspended",
        |_| capability(21),
    ),
    wants(
        "CAP_NET_ADMIN",
        "established connections cannot be reset at a rollback",
        |_| capability(12),
    ),
    wants(
        "CAP_SYS_RESOURCE",
        "limits of other users' processes are set from inside them",
        |_| capability(24),
    ),
    wants(
        "CAP_CHECKPOINT_RESTORE",
        "/proc/PID/map_files cannot be read without CAP_SYS_ADMIN",
        |_| capability(40),
    ),
    needs(
        "PTRACE_SEIZE, PTRACE_O_SUSPEND_SECCOMP",
        NOTHING_WORKS,
        |subject| subject.seized.clone(),
    ),
    needs(
        "XSAVE state through ptrace",
        "vector registers would be lost",
        xstate,
    ),
    wants(
        "PTRACE_GET_RSEQ_CONFIGURATION",
        "programs that use rseq are refused",
        |subject| told(ptrace::rseq(subject.pid), ""),
    ),
    needs("pidfd_open", NOTHING_WORKS, |subject| {
        told(pidfd::open(subject.pid), "")
    }),
    needs("pidfd_getfd", "descriptors cannot be looked at", |_| {
        getfd()
    }),
    needs(
        "kcmp",
        "objects that processes share cannot be told",
        |subject| told(kcmp::same(subject.pid, getpid(), kcmp::Shared::Memory), ""),
    ),
    needs(
        "userfaultfd WP_ASYNC",
        "changed pages cannot be found",
        |_| write_tracking(),
    ),
    needs("PAGEMAP_SCAN", "changed pages cannot be found", |_| {
        pagemap_scan()
    }),
    needs(
        "process_vm_readv, process_vm_writev",
        "memory of others cannot be reached",
        remote_memory,
    ),
    wants(
        "/dev/cpu_dma_latency",
        "stopped tasks wake up slowly on processors that sleep; a rollback takes 0.1 ms longer",
        |_| {
            let opened = fs::OpenOptions::new().write(true).open(latency::DEVICE);
            opened
                .map(|_| String::new())
                .map_err(|error| error.to_string())
        },
    ),
    needs(
        "memfd_create with sealing",
        "no memory to share with a process",
        |_| sealing(),
    ),
    needs(
        "/proc/PID/task/TID/children",
        "the tree of processes cannot be found",
        |_| told(procfs::children(getpid(), getpid()), ""),
    ),
    wants(
        "PR_GET_TID_ADDRESS",
        "set_tid_address of a thread is not put back",
        |_| tid_address(),
    ),
    wants(
        "PR_TIMER_CREATE_RESTORE_IDS",
        "deleted POSIX timers do not get their number back",
        |_| timer_ids(),
    ),
    wants(
        "NS_GET_PID_FROM_PIDNS",
        "PIDs inside a namespace are read from /proc",
        |_| namespace_pid(),
    ),
    wants(
        "sock_diag of unix sockets",
        "containers with unix sockets are refused",
        |_| told(SockDiag::open().and_then(|mut diag| diag.unix()), ""),
    ),
    wants(
        "sock_diag of internet sockets",
        "containers with TCP or UDP sockets are refused",
        |_| {
            let found =
                SockDiag::open().and_then(|mut diag| diag.inet(libc::AF_INET, libc::IPPROTO_TCP));
            told(found, "")
        },
    ),
    wants(
        "INET_DIAG_DESTROY",
        "a connection that must be reset makes a rollback refuse",
        |_| socket_destroy(),
    ),
    wants(
        "process events connector",
        "processes of a tree taken with --pid that leave their parents (daemons) are not found",
        |_| told(ProcEvents::open(1 << 16), ""),
    ),
    wants(
        "tracepoints of ctime for BPF",
        "a rollback of files looks at all of them, and watches all directories",
        |_| told(InodeChanges::start(), ""),
    ),
    wants("cgroup.freeze", "no pause and resume", |_| cgroup_freeze()),
];

/// A child that waits to be looked at, and is traced if that works.
struct Subject {
    pid: Pid,
    seized: Outcome,
}

impl Subject {
    fn start() -> Result<Subject, Errno> {
        // SAFETY: the child only makes system calls, as it must in a copy of a program that may have other threads.
        let pid = match unsafe { fork()? } {
            ForkResult::Parent { child } => child,
            ForkResult::Child => loop {
                pause();
            },
        };
        let seized = ptrace::seize(pid, ptrace::Options::HOLD_OR_KILL)
            .and_then(|()| ptrace::interrupt(pid))
            .and_then(|()| {
                ptrace::wait(pid)
                    .map_err(|error| Errno::from_raw(error.raw_os_error().unwrap_or(0)))
            });
        Ok(Subject {
            pid,
            seized: told(seized, ""),
        })
    }
}

impl Drop for Subject {
    fn drop(&mut self) {
        let _ = kill(self.pid, Signal::SIGKILL);
        let _ = waitpid(self.pid, None);
    }
}

/// The outcome of something of which only success counts.
fn told<T, E: std::fmt::Display>(result: Result<T, E>, detail: &str) -> Outcome {
    result
        .map(|_| detail.to_owned())
        .map_err(|error| error.to_string())
}

fn kernel_version(_: &Subject) -> Outcome {
    let name = nix::sys::utsname::uname().map_err(|errno| errno.to_string())?;
    let (release, machine) = (
        name.release().to_string_lossy(),
        name.machine().to_string_lossy(),
    );
    let mut numbers = release.split(|letter: char| !letter.is_ascii_digit());
    let mut number = || {
        numbers
            .next()
            .and_then(|word| word.parse::<u32>().ok())
            .unwrap_or(0)
    };
    let detail = format!("{release} {machine}");
    if (number(), number()) >= (6, 7) && machine == "x86_64" {
        Ok(detail)
    } else {
        Err(detail)
    }
}

fn capability(number: u32) -> Outcome {
    let status = fs::read_to_string("/proc/self/status").map_err(|error| error.to_string())?;
    let effective = procfs::status_line(&status, "CapEff")
        .and_then(|word| u64::from_str_radix(word.trim(), 16).ok())
        .ok_or("no CapEff in /proc/self/status")?;
    match effective >> number & 1 {
        1 => Ok(String::new()),
        _ => Err("not in the effective set".to_owned()),
    }
}

fn xstate(subject: &Subject) -> Outcome {
    let mut area = vec![0; 64 << 10];
    let size = ptrace::xstate(subject.pid, &mut area).map_err(|errno| errno.to_string())?;
    Ok(format!("{size} bytes"))
}

fn getfd() -> Outcome {
    let null = fs::File::open("/dev/null").map_err(|error| error.to_string())?;
    let own = pidfd::open(getpid()).map_err(|errno| errno.to_string())?;
    told(pidfd::get_fd(own.as_fd(), null.as_raw_fd()), "")
}

fn write_tracking() -> Outcome {
    // SAFETY: takes flags; the descriptor returned is new and nobody else's.
    let opened = unsafe {
        let fd = libc::syscall(libc::SYS_userfaultfd, libc::O_CLOEXEC | USER_MODE_ONLY);
        Errno::result(fd).map(|fd| OwnedFd::from_raw_fd(fd as i32))
    };
    told(opened.and_then(WriteTracker::enable), "")
}

fn pagemap_scan() -> Outcome {
    let pagemap = fs::File::open("/proc/self/pagemap").map_err(|error| error.to_string())?;
    let page = (&raw const pagemap as u64) & !4095;
    let mut found = Vec::new();
    pagemap::scan(
        &pagemap,
        Scan::Populated(Backing::Nothing),
        page,
        page + 4096,
        &mut found,
    )
    .map_err(|errno| errno.to_string())?;
    if found.is_empty() {
        Err("it does not see our own stack".to_owned())
    } else {
        Ok(String::new())
    }
}

/// The child's memory is a copy of ours, so it has the same at the same address.
fn remote_memory(subject: &Subject) -> Outcome {
    static MUTABLE: std::sync::atomic::AtomicU64 = std::sync::atomic::AtomicU64::new(0x736e_6170);
    let range = remote_memory::Range {
        start: MUTABLE.as_ptr() as u64,
        len: 8,
    };
    let mut read = [0; 8];
    remote_memory::read(subject.pid, &[range], &mut read)
        .and_then(|()| remote_memory::write(subject.pid, &[range], &read))
        .map_err(|errno| errno.to_string())?;
    match u64::from_ne_bytes(read) {
        0x736e_6170 => Ok(String::new()),
        other => Err(format!("it read {other:#x}")),
    }
}

fn sealing() -> Outcome {
    let flags = MemFdCreateFlag::MFD_CLOEXEC | MemFdCreateFlag::MFD_ALLOW_SEALING;
    let sealed = memfd_create(c"probe", flags).and_then(|memfd| {
        fcntl(
            memfd.as_raw_fd(),
            FcntlArg::F_ADD_SEALS(SealFlag::F_SEAL_SHRINK),
        )
    });
    told(sealed, "")
}

/// prctl(2), Linux 3.5 with `CONFIG_CHECKPOINT_RESTORE`.
fn tid_address() -> Outcome {
    let mut address = 0u64;
    // SAFETY: the kernel stores one pointer at `address`.
    let got = unsafe { libc::prctl(libc::PR_GET_TID_ADDRESS, &raw mut address, 0, 0, 0) };
    told(Errno::result(got), "")
}

/// Whether POSIX timers that were deleted can be made again under their numbers.
pub fn timers_keep_numbers() -> bool {
    timer_ids().is_ok()
}

/// prctl(2), Linux 6.15.
fn timer_ids() -> Outcome {
    const PR_TIMER_CREATE_RESTORE_IDS: i32 = 77;
    const GET: u64 = 2;
    // SAFETY: asks for a flag and takes integers.
    told(
        Errno::result(unsafe { libc::prctl(PR_TIMER_CREATE_RESTORE_IDS, GET, 0, 0, 0) }),
        "",
    )
}

/// ioctl_nsfs(2), Linux 6.11.
fn namespace_pid() -> Outcome {
    const NS_GET_PID_FROM_PIDNS: libc::c_ulong = nix::request_code_read!(0xb7, 6, size_of::<i32>());
    let namespace = fs::File::open("/proc/self/ns/pid").map_err(|error| error.to_string())?;
    // SAFETY: takes an integer.
    let pid = unsafe {
        libc::ioctl(
            namespace.as_raw_fd(),
            NS_GET_PID_FROM_PIDNS,
            getpid().as_raw(),
        )
    };
    told(Errno::result(pid), "")
}

/// Destroys a connection of our own.
fn socket_destroy() -> Outcome {
    let pair = || {
        let listener = TcpListener::bind("127.0.0.1:0")?;
        let stream = TcpStream::connect(listener.local_addr()?)?;
        Ok((stream.local_addr()?, stream, listener))
    };
    let (address, _stream, _listener) = pair().map_err(|error: std::io::Error| {
        format!("no connection on the loopback interface to try it on: {error}")
    })?;
    let mut diag = SockDiag::open().map_err(|errno| errno.to_string())?;
    let sockets = diag
        .inet(libc::AF_INET, libc::IPPROTO_TCP)
        .map_err(|errno| errno.to_string())?;
    let ours = sockets
        .iter()
        .find(|socket| socket.local == address)
        .ok_or("our own connection is not listed")?;
    told(diag.destroy(ours), "")
}

/// Every cgroup v2 but the root has it since Linux 5.2, long before what we need: what counts is the hierarchy.
fn cgroup_freeze() -> Outcome {
    let mounts = fs::read_to_string("/proc/self/mountinfo").map_err(|error| error.to_string())?;
    let mount = mounts
        .lines()
        .find(|line| line.contains(" - cgroup2 "))
        .and_then(|line| line.split(' ').nth(4))
        .ok_or("cgroup v2 is not mounted")?;
    Ok(format!("in {mount}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn everything_mandatory_is_here() {
        for feature in probe().unwrap() {
            assert!(feature.present || !feature.mandatory, "{feature:?}");
        }
    }

    #[test]
    fn a_missing_capability_is_missing() {
        assert!(capability(63).is_err());
    }
}
