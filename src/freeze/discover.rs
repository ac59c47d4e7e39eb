//! Which processes belong to a tree.

use std::collections::BTreeSet;
use std::fs;
use std::path::PathBuf;

use nix::unistd::Pid;

use crate::kernel::procfs;

use super::{Context, Result, refuse};

/// How far a tree reaches.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Scope {
    /// The root and its descendants.
    Descendants,
    /// All of a PID namespace.
    Namespace {
        /// The namespace, as `pid:[4026531836]`.
        link: PathBuf,
    },
}

impl Scope {
    pub(super) fn of(root: Pid) -> Result<Self> {
        let path = procfs::path(root, "status");
        let status = fs::read_to_string(&path).context(|| format!("read {}", path.display()))?;
        if procfs::is_init_below(&status) {
            let path = procfs::path(root, "ns/pid");
            let link = fs::read_link(&path).context(|| format!("read {}", path.display()))?;
            return Ok(Self::Namespace { link });
        }
        Ok(Self::Descendants)
    }

    /// Processes of the tree that are not children of its processes: those that joined a container's namespace.
    /// `known` are PIDs in our namespace, `known_inside` the same processes' PIDs in theirs.
    pub(super) fn joined(
        &self,
        root: Pid,
        known: &BTreeSet<Pid>,
        known_inside: &BTreeSet<i32>,
    ) -> Result<Vec<Pid>> {
        let Self::Namespace { link } = self else {
            return Ok(Vec::new());
        };
        // The container's own /proc lists few processes; only if it has one that is not known is the whole machine
        // searched.
        if let Ok(inside) = procfs::numbers(&procfs::path(root, "root/proc"))
            && inside.iter().any(|pid| pid.as_raw() == 1)
            && inside
                .iter()
                .all(|pid| known_inside.contains(&pid.as_raw()))
        {
            return Ok(Vec::new());
        }
        let all = procfs::numbers(std::path::Path::new("/proc")).context(|| "list /proc".into())?;
        Ok(all
            .into_iter()
            .filter(|pid| !known.contains(pid))
            .filter(|pid| fs::read_link(procfs::path(*pid, "ns/pid")).is_ok_and(|of| of == *link))
            .collect())
    }
}

/// The root and its descendants as lists of children tell of them while they run.
pub(super) fn descendants(root: Pid) -> BTreeSet<Pid> {
    let mut found = BTreeSet::from([root]);
    let mut pending = vec![root];
    while let Some(pid) = pending.pop() {
        // What has ended meanwhile has no children any more.
        for tid in procfs::tasks(pid).unwrap_or_default() {
            let children = procfs::children(pid, tid).unwrap_or_default();
            pending.extend(children.into_iter().filter(|child| found.insert(*child)));
        }
    }
    found
}

/// Refuses roots that can't be stopped, by name.
pub(super) fn check_root(root: Pid) -> Result<()> {
    if root.as_raw() <= 0 {
        return Err(refuse(root, "the tree", "a PID is a positive number"));
    }
    let Ok(stat) = procfs::Stat::read(root) else {
        return Err(refuse(root, "the tree", "there is no such process"));
    };
    if matches!(stat.state, 'Z' | 'X') {
        return Err(refuse(
            root,
            "the tree",
            "the process has ended and is only waiting to be reaped",
        ));
    }
    if fs::read_link(procfs::path(root, "exe"))
        .is_err_and(|error| error.kind() == std::io::ErrorKind::NotFound)
    {
        return Err(refuse(
            root,
            "the tree",
            "this is a kernel thread; name a process that runs a program",
        ));
    }
    let mut ancestor = Pid::this();
    while ancestor.as_raw() > 0 {
        if ancestor == root {
            return Err(refuse(
                root,
                "the tree",
                "it holds the process that asks; run snapback from outside of it",
            ));
        }
        ancestor = procfs::Stat::read(ancestor).map_or(Pid::from_raw(0), |stat| stat.parent());
    }
    Ok(())
}

/// Says why a task could not be seized, as precisely as can be known.
pub(super) fn why_not_seized(pid: Pid, tid: Pid) -> super::Error {
    let status = fs::read_to_string(format!("/proc/{pid}/task/{tid}/status")).unwrap_or_default();
    if let Some(tracer) = procfs::status_line(&status, "TracerPid").filter(|tracer| *tracer != "0")
    {
        let name = tracer
            .parse()
            .map_or_else(|_| String::new(), |pid| procfs::comm(Pid::from_raw(pid)));
        return refuse(
            pid,
            format!("thread {tid}"),
            format!("it is traced by pid {tracer} ({name}); detach that first"),
        );
    }
    if procfs::status_line(&status, "State").is_some_and(|state| state.starts_with('Z')) {
        return refuse(
            pid,
            format!("thread {tid}"),
            "the main thread has ended while others run; such a process can't be taken yet",
        );
    }
    refuse(
        pid,
        format!("thread {tid}"),
        "ptrace was not permitted; run as root with CAP_SYS_PTRACE and see kernel.yama.ptrace_scope",
    )
}
