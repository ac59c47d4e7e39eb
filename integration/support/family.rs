//! A child whose whole family is gone when the test is.

use std::collections::BTreeSet;
use std::os::unix::process::CommandExt;
use std::process::{Child, Command};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::{numbers, wait};

/// A child process in a process group of its own. Dropping it kills it, its descendants and its group, by PID, and
/// reaps it.
#[derive(Debug)]
pub(crate) struct Family {
    /// The root of the tree, or its reaper.
    pub(crate) child: Child,
    /// The root, if the child is its reaper.
    root: Option<i32>,
}

impl Family {
    /// Starts the command as leader of a new process group.
    pub(crate) fn start(command: &mut Command) -> Self {
        let child = command
            .process_group(0)
            .spawn()
            .unwrap_or_else(|error| panic!("starting {command:?}: {error}"));
        Self { child, root: None }
    }

    /// The same of a command that starts by `reaper` of the fixtures.
    pub(crate) fn start_below_reaper(command: &mut Command) -> Self {
        let mut family = Self::start(command);
        let reaper = family.pid();
        wait::until("the reaper has a child", || {
            let mut all = numbers::processes().into_iter();
            let root = all.find(|(_, stat)| stat.parent == reaper);
            family.root = root.map(|(root, _)| root);
            family.root.is_some()
        });
        family
    }

    /// PID of the root.
    pub(crate) fn pid(&self) -> i32 {
        self.root
            .unwrap_or_else(|| i32::try_from(self.child.id()).expect("a PID"))
    }

    /// The living of this family: the root, its descendants, and what is left in its process group.
    pub(crate) fn members(&self) -> BTreeSet<i32> {
        let all = numbers::processes();
        let root = self.pid();
        let mut members = BTreeSet::from([root]);
        loop {
            let before = members.len();
            for (pid, stat) in &all {
                if stat.group == root || members.contains(&stat.parent) {
                    members.insert(*pid);
                }
            }
            if members.len() == before {
                break;
            }
        }
        members.retain(|pid| all.get(pid).is_some_and(|stat| stat.state != 'Z'));
        members
    }

    /// Kills all members and waits until they are gone.
    pub(crate) fn end(&mut self) {
        let gone = wait::within(wait::PATIENCE, || {
            let members = self.members();
            for pid in &members {
                // It may be gone already; what counts is that the next look finds nobody.
                let _ = kill(Pid::from_raw(*pid), Signal::SIGKILL);
            }
            // A zombie that somebody still traces can't be reaped.
            members.is_empty() && !matches!(self.child.try_wait(), Ok(None))
        });
        assert!(
            gone || std::thread::panicking(),
            "{} did not die: {:?}",
            self.pid(),
            self.members()
        );
    }
}

impl Drop for Family {
    fn drop(&mut self) {
        self.end();
    }
}
