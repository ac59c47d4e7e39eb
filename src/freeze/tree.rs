//! A process tree as it is known between operations.

use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};

use nix::unistd::Pid;

use crate::kernel::latency::Latency;
use crate::kernel::ptrace::{self, Event, Registers};
use crate::kernel::{pidfd, procfs};

use super::calls::Calls;
use super::inject::TargetWindow;
use super::stopped::Stopped;
use super::watch::Watch;
use super::{Context, Result, discover, refuse};

/// What becomes of stopped tasks if the thread that stopped them dies.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OnTracerDeath {
    /// They run on from where they were.
    RunOn,
    /// They are killed: for operations that pass through states which must not run.
    Die,
}

/// A process of a tree, with what is held open of it between operations. None of this keeps a resource of the
/// process itself alive.
#[derive(Debug)]
pub struct Member {
    /// Its PID in our namespace.
    pub pid: Pid,
    /// Its PID in its own PID namespace.
    pub namespace_pid: i32,
    /// Means this very process for ever.
    pub pidfd: OwnedFd,
    /// `/proc/PID/mem` of the address space it had when it became known.
    pub memory: File,
    /// `/proc/PID/maps` of that address space; it reads as empty once the process has exec'd or exited.
    pub maps: File,
    /// `/proc/PID/pagemap` of that address space.
    pub pagemap: File,
    /// `/proc/PID/stat`.
    pub stat: File,
    /// `/proc/PID/status`.
    pub status: File,
    /// `/proc/PID/task`, a directory.
    pub tasks: File,
    /// `/proc/PID/fd`, a directory.
    pub numbers: File,
    /// `/proc/PID/ns`, a directory.
    pub namespaces: File,
    /// Small files of `/proc/PID` that tell what nothing else does.
    pub settings: Settings,
    /// The window into it, once one was needed.
    pub window: Option<TargetWindow>,
    /// Names its address space in this tree: another process of the same PID, or the same one after execve(2), has
    /// another.
    pub generation: u64,
}

/// Files of `/proc/PID` that hold one setting of a process each; none where the kernel was built without it.
#[derive(Debug)]
pub struct Settings {
    /// `oom_score_adj`, to read and write.
    pub oom_score: Option<File>,
    /// `coredump_filter`, to read and write.
    pub core_filter: Option<File>,
    /// `loginuid`.
    pub login_user: Option<File>,
    /// `cgroup`.
    pub cgroups: Option<File>,
}

impl Settings {
    fn open(pid: Pid) -> Self {
        let open = |name: &str, write| {
            let mut options = OpenOptions::new();
            options.read(true).write(write);
            options.open(procfs::path(pid, name)).ok()
        };
        Self {
            oom_score: open("oom_score_adj", true),
            core_filter: open("coredump_filter", true),
            login_user: open("loginuid", false),
            cgroups: open("cgroup", false),
        }
    }
}

impl Member {
    pub(super) fn open(pid: Pid) -> Result<Self> {
        let open = |name: &str, write| {
            OpenOptions::new()
                .read(true)
                .write(write)
                .open(procfs::path(pid, name))
                .context(|| format!("open /proc/{pid}/{name}"))
        };
        let status = open("status", false)?;
        let text = procfs::text_held(&status).context(|| format!("read /proc/{pid}/status"))?;
        Ok(Self {
            pid,
            namespace_pid: procfs::pid_inside(&text).unwrap_or(pid.as_raw()),
            pidfd: pidfd::open(pid).context(|| format!("pidfd_open {pid}"))?,
            memory: open("mem", true)?,
            maps: open("maps", false)?,
            pagemap: open("pagemap", false)?,
            stat: open("stat", false)?,
            status,
            tasks: open("task", false)?,
            numbers: open("fd", false)?,
            namespaces: open("ns", false)?,
            settings: Settings::open(pid),
            window: None,
            generation: 0,
        })
    }

    /// Whether the process has not ended; a zombie has.
    fn runs(&self) -> bool {
        self.is_alive() && !pidfd::has_ended(self.pidfd.as_fd())
    }

    /// Whether it still has the address space it had when it became known.
    pub fn has_its_memory(&self) -> bool {
        let mut byte = [0];
        std::os::unix::fs::FileExt::read_at(&self.maps, &mut byte, 0).is_ok_and(|len| len == 1)
    }

    /// Whether the process has not been reaped.
    pub fn is_alive(&self) -> bool {
        pidfd::send_signal(self.pidfd.as_fd(), 0).is_ok()
    }
}

/// A thread in a system call that goes on by restart_syscall(2), and which call that is is not known.
#[derive(Debug, Clone, Copy)]
pub struct UnknownCall {
    /// Its process.
    pub pid: Pid,
    /// The thread.
    pub tid: Pid,
    registers: Registers,
}

impl UnknownCall {
    pub(super) fn new(pid: Pid, tid: Pid, registers: Registers) -> Self {
        Self {
            pid,
            tid,
            registers,
        }
    }
}

/// A process tree below one root.
#[derive(Debug)]
pub struct Tree {
    pub(super) root: Pid,
    pub(super) scope: discover::Scope,
    pub(super) members: BTreeMap<Pid, Member>,
    /// PIDs in our namespace and in theirs of processes that are ours.
    pub(super) shadows: BTreeMap<Pid, i32>,
    /// Tasks that were asked to stop, have not yet, and are to be let go as soon as they have; and those that were killed while
    /// they were stopped, whose deaths are to be collected.
    pub(super) stragglers: Vec<Pid>,
    /// Address spaces seen so far.
    pub(super) generations: u64,
    /// Tells of descendants that have left their parents. None: it is not needed or can't be had.
    pub(super) watch: Option<Watch>,
    /// Which calls of threads go on by restart_syscall(2).
    pub(super) calls: Calls,
    /// Has stopped tasks wake up quickly.
    pub(super) latency: Latency,
}

impl Tree {
    /// Takes note of the tree below `root`, a process; nothing is stopped.
    ///
    /// The tree is `root` and its descendants, those too that leave their parents from now on; if `root` is the init of a PID namespace of its own, every process of
    /// that namespace, wherever its parent is.
    pub fn new(root: Pid) -> Result<Self> {
        discover::check_root(root)?;
        let member = Member::open(root)?;
        let scope = discover::Scope::of(root)?;
        let watch = match scope {
            discover::Scope::Descendants => Watch::start(root),
            discover::Scope::Namespace { .. } => None,
        };
        Ok(Self {
            root,
            scope,
            members: BTreeMap::from([(root, member)]),
            shadows: BTreeMap::new(),
            stragglers: Vec::new(),
            generations: 0,
            watch,
            calls: Calls::default(),
            latency: Latency::open(),
        })
    }

    /// How often process events were lost so far. Processes of the tree that left their parents between a checkpoint and
    /// a later loss may not be known.
    pub fn losses(&self) -> u64 {
        self.watch.as_ref().map_or(0, Watch::losses)
    }

    /// Makes it lose process events, if it is told any.
    #[cfg(test)]
    pub(crate) fn lose_events(&self) -> bool {
        self.watch
            .as_ref()
            .inspect(|watch| watch.overflow())
            .is_some()
    }

    /// The processors that the tree ran on last, if its processes are few: those of many are everywhere.
    ///
    /// A batch that is started on our processor runs instead of us, and not beside us: where processors are few, the
    /// scheduler does not look for an idle one (`select_idle_cpu`).
    pub(super) fn processors(&self) -> Vec<usize> {
        const FEW: usize = 4;
        if self.members.len() > FEW {
            return Vec::new();
        }
        let members = self.members.values();
        let stats = members.filter_map(|member| procfs::Stat::read_held(&member.stat).ok());
        stats.map(|stat| stat.processor()).collect()
    }

    /// The root's PID.
    pub fn root(&self) -> Pid {
        self.root
    }

    /// Learns which calls threads sleep in that were stopped in one that nobody knew, and let go since. Waits a moment for
    /// them to sleep again; one that does not is not in that call any more.
    pub fn learn_calls(&mut self, unknown: &[UnknownCall]) {
        const PATIENCE: Duration = Duration::from_millis(100);
        let deadline = Instant::now() + PATIENCE;
        for call in unknown {
            while !self.calls.learn((call.pid, call.tid), &call.registers)
                && Instant::now() < deadline
            {
                std::thread::yield_now();
            }
        }
    }

    /// Whether the root lives; a zombie does not.
    pub fn is_alive(&self) -> bool {
        self.members[&self.root].runs()
    }

    /// A process that is or was in the tree.
    pub fn member(&self, pid: Pid) -> Option<&Member> {
        self.members.get(&pid)
    }

    /// As [`Tree::member`], to be changed.
    pub fn member_mut(&mut self, pid: Pid) -> Option<&mut Member> {
        self.members.get_mut(&pid)
    }

    /// Leaves a process out of the tree for ever: a shadow, whose PID in its own namespace is `inside`.
    pub fn add_shadow(&mut self, pid: Pid, inside: i32) {
        self.shadows.insert(pid, inside);
    }

    /// The PID of a shadow in its own PID namespace.
    pub fn shadow_inside(&self, pid: Pid) -> Option<i32> {
        self.shadows.get(&pid).copied()
    }

    /// Forgets a shadow that was killed and reaped.
    pub fn remove_shadow(&mut self, pid: Pid) {
        self.shadows.remove(&pid);
    }

    /// Whether tasks of a failed attempt at stopping the tree have still to be let go.
    pub fn has_stragglers(&self) -> bool {
        !self.stragglers.is_empty()
    }

    /// Lets those tasks go that have stopped by now. To be called now and then while there are stragglers.
    pub fn let_stragglers_go(&mut self) {
        self.stragglers.retain(|tid| match ptrace::poll(*tid) {
            Ok(None) => true,
            Ok(Some(Event::Interrupted)) => {
                let _ = ptrace::detach(*tid, 0);
                false
            }
            Ok(Some(Event::Signal(signal))) => ptrace::resume_to_stop(*tid, signal).is_ok(),
            Ok(Some(Event::Forked(_) | Event::Other(_))) => ptrace::resume_to_stop(*tid, 0).is_ok(),
            Ok(Some(Event::Exited(_))) | Err(_) => false,
        });
    }

    /// Drops what is held of processes that `keep` does not name and that are gone.
    pub fn forget_dead(&mut self, keep: impl Fn(Pid) -> bool) {
        let root = self.root;
        self.members
            .retain(|pid, member| *pid == root || keep(*pid) || member.runs());
    }

    /// Stops every task of the tree, however many are being made meanwhile.
    ///
    /// On failure all that was stopped runs again.
    pub fn stop(&mut self, on_death: OnTracerDeath) -> Result<Stopped<'_>> {
        let root = self.root;
        let ended = || {
            let remedy = "its root process has ended; roll it back, or release the checkpoints and start it again";
            refuse(root, "the tree", remedy)
        };
        if !self.is_alive() {
            return Err(ended());
        }
        let stopped = Stopped::stop(self, on_death)?;
        match stopped.processes.contains_key(&root) {
            true => Ok(stopped),
            false => Err(ended()),
        }
    }

    /// As [`Tree::stop`], but its root may have ended, and all others too, if that does not mean the end of their PID
    /// namespace.
    pub fn stop_remains(&mut self, on_death: OnTracerDeath) -> Result<Stopped<'_>> {
        match self.can_lose_root() {
            true => Stopped::stop(self, on_death),
            false => self.stop(on_death),
        }
    }

    /// Whether the tree can go on without its root.
    pub fn can_lose_root(&self) -> bool {
        self.scope == discover::Scope::Descendants
    }

    /// Kills every process of the tree, the root first, and the shadows.
    pub fn kill(&mut self) {
        let root = self.root;
        let root_first =
            std::iter::once(root).chain(self.members.keys().copied().filter(|pid| *pid != root));
        for pid in root_first {
            let _ = pidfd::send_signal(self.members[&pid].pidfd.as_fd(), libc::SIGKILL);
        }
    }
}
