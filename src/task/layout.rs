//! The payloads of this room's records. All of them are read in place.

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use crate::kernel::host_names::Names;
use crate::kernel::namespaces::Inodes;
use crate::kernel::registers::WORDS;
use crate::kernel::scheduling::{Attributes, Processors};

use super::settings::Settings;

/// Number of signals.
pub(super) const SIGNALS: usize = 64;
/// Number of resource limits (`RLIM_NLIMITS`).
pub(super) const LIMITS: usize = 16;
/// Number of interval timers: real, virtual, profiling.
pub(super) const INTERVAL_TIMERS: usize = 3;

/// What names a process for as long as the machine runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable)]
#[repr(C)]
pub struct Identity {
    /// PID in our namespace.
    pub pid: i32,
    /// PID of the parent in our namespace.
    pub parent: i32,
    /// Process group in our namespace.
    pub group: i32,
    /// Session in our namespace.
    pub session: i32,
    /// When it started, in clock ticks since boot.
    pub start_time: u64,
    /// Inode of its pidfd, which no other process ever has (Linux 6.9); 0 for a zombie.
    pub pidfd_inode: u64,
    /// 1 if it had ended and waited to be reaped.
    pub zombie: u32,
    /// The signal by which job control had stopped it; 0 if it had not.
    pub job_control_stop: i32,
    /// PID in its own namespace.
    pub namespace_pid: i32,
    /// The signal its parent gets when it ends.
    pub exit_signal: i32,
    /// How it ended, as wait(2) tells it; 0 if it had not.
    pub wait_status: i32,
    /// Device number of its terminal; 0 if it has none.
    pub terminal: i32,
}

/// The payload of a process record; the path of the working directory follows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable)]
#[repr(C)]
pub struct ProcessRecord {
    /// Which process it is.
    pub identity: Identity,
    /// Its state; all zero for a zombie.
    pub state: ProcessState,
    /// What files of `/proc` tell of it.
    pub settings: Settings,
}

/// Process-wide state, as the process itself is asked for it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable)]
#[repr(C)]
pub struct ProcessState {
    /// Soft and hard resource limits by number (getrlimit(2)).
    pub limits: [[u64; 2]; LIMITS],
    /// Device and inode of the working directory.
    pub directory: [u64; 2],
    /// Device and inode of the root directory.
    pub root: [u64; 2],
    /// File mode creation mask.
    pub umask: u64,
    /// `PR_GET_DUMPABLE`.
    pub dumpable: u64,
    /// `PR_GET_CHILD_SUBREAPER`.
    pub subreaper: u64,
    /// personality(2).
    pub personality: u64,
    /// `PR_GET_THP_DISABLE`.
    pub huge_pages_disabled: u64,
    /// `PR_GET_MEMORY_MERGE`.
    pub merges_memory: u64,
    /// `PR_GET_MDWE`.
    pub denies_write_execute: u64,
    /// Whether it has a local descriptor table (modify_ldt(2)).
    pub local_descriptors: u64,
    /// The names of the host and its domain; empty if they are those of our own UTS namespace.
    pub host_names: Names,
}

impl ProcessState {
    /// That of a zombie.
    pub(super) fn nothing() -> Self {
        zerocopy::FromZeros::new_zeroed()
    }
}

/// What a process does on a signal: `struct kernel_sigaction`.
#[derive(
    Debug, Clone, Copy, Default, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable,
)]
#[repr(C)]
pub struct Action {
    /// Address of the handler, `SIG_DFL` (0) or `SIG_IGN` (1).
    pub handler: u64,
    /// `SA_*`.
    pub flags: u64,
    /// Address of the code that a handler returns to.
    pub restorer: u64,
    /// Signals blocked while the handler runs.
    pub mask: u64,
}

/// Seconds and microseconds (interval timers) or nanoseconds (POSIX timers).
pub(super) type Time = [i64; 2];
/// Interval and time left, as `struct itimerval` and `struct itimerspec`.
pub(super) type TimerValue = [Time; 2];

/// The fixed part of a timers record; a list of [`PosixTimer`](super::PosixTimer) follows.
#[derive(
    Debug, Clone, Copy, Default, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable,
)]
#[repr(C)]
pub struct TimersRecord {
    /// The interval timers: interval and time left in seconds and microseconds.
    pub interval: [TimerValue; INTERVAL_TIMERS],
}

/// The fixed part of a thread record; the extended state in XSAVE layout follows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable)]
#[repr(C)]
pub struct ThreadRecord {
    /// Object id of the process.
    pub process: u64,
    /// TID in our namespace.
    pub tid: u64,
    /// The general registers to run on with.
    pub registers: [u64; WORDS],
    /// Blocked signals, bit `n - 1` for signal `n`.
    pub signal_mask: u64,
    /// Address of the rseq area; 0 if none is registered.
    pub rseq_address: u64,
    /// Its size in bytes.
    pub rseq_size: u32,
    /// The signature before abort handlers.
    pub rseq_signature: u32,
    /// The namespaces it lives in; all 0 if nobody looked.
    pub namespaces: Inodes,
    /// What the thread itself was asked for.
    pub state: ThreadState,
}

/// State of one thread, as the thread itself is asked for it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable)]
#[repr(C)]
pub struct ThreadState {
    /// Alternate signal stack: address, flags, size (sigaltstack(2)).
    pub alternate_stack: [u64; 3],
    /// Head and length of the robust futex list (get_robust_list(2)).
    pub robust_list: [u64; 2],
    /// Where the kernel writes 0 when the thread ends (set_tid_address(2)).
    pub tid_address: u64,
    /// Command name.
    pub comm: [u8; 16],
    /// `PR_GET_TIMERSLACK`, nanoseconds.
    pub timer_slack: u64,
    /// `PR_GET_PDEATHSIG`.
    pub parent_death_signal: u64,
    /// ioprio_get(2).
    pub io_priority: u64,
    /// Policy, nice value, priority.
    pub scheduling: Attributes,
    /// Processors it may run on.
    pub processors: Processors,
    /// `PR_GET_KEEPCAPS`.
    pub keep_capabilities: u64,
    /// Mode and nodes of its memory policy (get_mempolicy(2)).
    pub memory_policy: MemoryPolicy,
    /// `PR_MCE_KILL_GET`.
    pub machine_check_policy: u64,
    /// `PR_GET_TSC`.
    pub time_stamp_counter: u64,
    /// Whether it may use `cpuid` (arch_prctl(2), `ARCH_GET_CPUID`).
    pub processor_identification: u64,
    /// `PR_GET_SPECULATION_CTRL` of store bypass and of indirect branches.
    pub speculation: [u64; 2],
    /// TID in its own namespace.
    pub namespace_tid: u64,
    /// What can't be undone.
    pub rights: Rights,
}

/// Mode and nodes, one bit each, of a memory policy.
#[derive(Debug, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable)]
#[repr(C)]
pub struct MemoryPolicy {
    /// `MPOL_*`.
    pub mode: u64,
    /// The nodes it names.
    pub nodes: [u64; 16],
}

/// Supplementary groups that are looked at one by one.
pub(super) const GROUPS: usize = 32;

/// Credentials of a thread that only go one way.
#[derive(Debug, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable)]
#[repr(C)]
pub struct Rights {
    /// Real, effective and saved user id.
    pub users: [u32; 3],
    /// Real, effective and saved group id.
    pub groups: [u32; 3],
    /// Effective, permitted and inheritable capabilities, low words then high words (capget(2)).
    pub capabilities: [u32; 6],
    /// `PR_GET_NO_NEW_PRIVS`.
    pub no_new_privileges: u64,
    /// `PR_GET_SECUREBITS`, without that of `PR_GET_KEEPCAPS`.
    pub secure_bits: u64,
    /// `PR_GET_SECCOMP`.
    pub seccomp: u64,
    /// Number of its seccomp filters.
    pub filters: u64,
    /// User and group id for access to files (setfsuid(2)).
    pub file_system: [u64; 2],
    /// Number of supplementary groups.
    pub group_count: u64,
    /// The supplementary groups, if they are no more than this.
    pub supplementary: [u32; GROUPS],
}

impl Rights {
    /// The first thing in which another differs, and what it is here and there.
    pub(super) fn difference(&self, other: &Self) -> Option<(&'static str, String, String)> {
        let words = |one: &dyn std::fmt::Debug| format!("{one:x?}");
        let pair = |rights: &Self| -> [(&'static str, String); 9] {
            [
                ("user ids", format!("{:?}", rights.users)),
                ("group ids", format!("{:?}", rights.groups)),
                ("file system ids", format!("{:?}", rights.file_system)),
                ("capabilities", words(&rights.capabilities)),
                ("no_new_privs", words(&rights.no_new_privileges)),
                ("secure bits", words(&rights.secure_bits)),
                ("seccomp mode", words(&rights.seccomp)),
                ("number of seccomp filters", words(&rights.filters)),
                ("supplementary groups", rights.group_list()),
            ]
        };
        let mut pairs = pair(self).into_iter().zip(pair(other));
        pairs.find_map(|((what, was), (_, is))| (was != is).then_some((what, was, is)))
    }

    fn group_list(&self) -> String {
        match self.supplementary.get(..self.group_count as usize) {
            Some(groups) => format!("{groups:?}"),
            None => format!("{} of them", self.group_count),
        }
    }
}
