//! Processes of the tree whose parents have ended: a daemon that forked twice, what `nohup` left running. Another process,
//! outside of the tree, has adopted them, so that no list of children leads to them; their births do (see [`Watch`]).
//!
//! [`Watch`]: super::watch::Watch

use std::collections::BTreeSet;

use nix::unistd::Pid;

use crate::kernel::procfs;

use super::discover::Scope;
use super::stopped::Stopped;
use super::tree::Member;

impl Stopped<'_> {
    /// Takes note of births up to now, and lets those of `orphans` go that turn out to be strangers: a PID can pass to
    /// another process between the look at it and its stop. Once it has stopped its birth has been told.
    pub(super) fn catch_up(&mut self, found: &mut BTreeSet<Pid>, orphans: &mut BTreeSet<Pid>) {
        let Some(watch) = &mut self.tree.watch else {
            return;
        };
        watch.catch_up();
        let members = &self.tree.members;
        let is_ours =
            |pid: &Pid| members.get(pid).is_some_and(Member::is_alive) || watch.knows(*pid);
        let strangers: Vec<Pid> = orphans
            .iter()
            .filter(|pid| !is_ours(pid))
            .copied()
            .collect();
        for pid in strangers {
            orphans.remove(&pid);
            found.remove(&pid);
            self.let_go(pid);
        }
    }

    /// Adds living descendants that are not found yet to both sets. All that is known must be stopped.
    pub(super) fn add_orphans(&self, found: &mut BTreeSet<Pid>, orphans: &mut BTreeSet<Pid>) {
        let Some(watch) = &self.tree.watch else {
            return;
        };
        for pid in watch.others(found) {
            if !self.tree.shadows.contains_key(&pid) && has_not_ended(pid) {
                found.insert(pid);
                orphans.insert(pid);
            }
        }
    }

    /// The tree is stopped: nothing else descends from its root.
    pub(super) fn know_all(&self) {
        if let Some(watch) = &self.tree.watch {
            let living = self
                .processes
                .values()
                .filter(|process| !process.is_zombie());
            watch.set(living.map(|process| process.pid));
        }
    }

    /// Takes note of a process of the tree whose parent is not.
    pub(super) fn know(&mut self, pid: Pid) {
        if let Some(watch) = &mut self.tree.watch {
            watch.add(pid);
        }
    }

    /// Whether a zombie with this parent is nothing to us any more: another than the tree will reap it, and when is not
    /// ours to say.
    pub(super) fn is_reaped_outside(&self, parent: Pid) -> bool {
        let in_tree = |pid: &Pid| {
            self.processes.contains_key(pid)
                || self.tree.members.get(pid).is_some_and(Member::is_alive)
        };
        self.tree.scope == Scope::Descendants && !in_tree(&parent)
    }
}

/// Whether any of its threads lives.
fn has_not_ended(pid: Pid) -> bool {
    procfs::Stat::read(pid).is_ok_and(|stat| {
        !matches!(stat.state, 'Z' | 'X') || procfs::tasks(pid).is_ok_and(|tids| tids.len() > 1)
    })
}
