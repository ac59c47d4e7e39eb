//! Records of processes for a tree that was made of them elsewhere: in other namespaces and cgroups, on other file systems.

use std::os::unix::fs::MetadataExt;

use nix::unistd::Pid;

use crate::freeze::{Error as FreezeError, Stopped};
use crate::kernel::namespaces::Inodes;
use crate::kernel::procfs;
use crate::record::{Context, Kind};

use super::check::refuse;
use super::layout::{ProcessRecord, ThreadRecord};
use super::recorded::{Recorded, RecordedProcess, Renamed};
use super::settings::{self, CGROUP, LOGIN_USER};
use super::{About, Result, capture, rights};

/// The lines that tell in which cgroups a process is.
fn cgroups(rights: &str) -> impl Iterator<Item = &str> {
    rights.lines().filter(|line| line.starts_with(CGROUP))
}

/// Refuses if there are processes among the recorded ones that can't be made of their records alone: they were in other
/// namespaces or cgroups than the root, in a session or group whose leader had ended, at a terminal, stopped.
pub fn check_transplant(recorded: &Recorded<'_>) -> Result<()> {
    let is_there = |pid: i32| recorded.process(Pid::from_raw(pid)).is_some();
    let mut roots = recorded.processes().filter(|process| {
        recorded.process(process.parent()).is_none() && process.identity.namespace_pid == 1
    });
    let root = roots.next();
    for process in recorded.processes() {
        let deny = |object: &str, remedy: &str| {
            Err(refuse(
                process,
                object,
                format!("{remedy}; it can't be made of an image yet"),
            )
            .into())
        };
        let Some(root) = root else {
            return deny(
                "its PID namespace",
                "it is not of a container, with an init of its own",
            );
        };
        if !is_there(process.identity.parent) && process.pid() != root.pid() {
            return deny("its parent", "it came from outside of the container (exec)");
        }
        if !is_there(process.identity.group) || !is_there(process.identity.session) {
            return deny(
                "its process group or session",
                "the leader of that had ended",
            );
        }
        if process.is_zombie() {
            continue;
        }
        if process.identity.terminal != 0 {
            return deny("its terminal", "it had one");
        }
        if process.identity.job_control_stop != 0 {
            return deny("job control", "it was stopped");
        }
        let of_root = namespaces(root);
        let threads = process.threads.values();
        // All 0: nobody looked, as it shares them with its leader.
        let known = |is: &Inodes| *is != Inodes::default();
        let differ = |is: &Inodes| known(is) && of_root.is_some_and(|of_root| of_root != *is);
        if threads
            .map(|thread| thread.record.namespaces)
            .any(|is| differ(&is))
        {
            return deny(
                "its namespaces",
                "it was in others than the container's init",
            );
        }
        if cgroups(process.rights).ne(cgroups(root.rights)) {
            return deny("its cgroup", "it was in another than the container's init");
        }
        if process.record.state.root != root.record.state.root {
            return deny("its root directory", "it was in a chroot");
        }
        let made_by = recorded
            .begins_as(process)
            .filter(|maker| maker.pid() != process.pid());
        if let Some(obstacle) = made_by.and_then(|maker| rights::obstacle(process, maker)) {
            return deny("its credentials", obstacle);
        }
        let own = process.threads.get(&process.pid());
        let own = own.map(|leader| leader.record.state.rights);
        let mut threads = process.threads.values();
        if threads.any(|thread| Some(thread.record.state.rights) != own) {
            return deny("its credentials", "its threads had different ones");
        }
        if process.directory.is_empty() {
            return deny("its working directory", "that was deleted");
        }
    }
    Ok(())
}

fn namespaces(process: &RecordedProcess<'_>) -> Option<Inodes> {
    let leader = process.threads.get(&process.pid())?;
    Some(leader.record.namespaces)
}

/// Copies the records of processes into the context of a tree that was made of them, with what is different there:
/// namespaces, cgroups, login user, directories. `renamed` tells the numbers of the processes.
pub fn transplant(
    stopped: &Stopped<'_>,
    from: &Context,
    renamed: &Renamed,
    to: &mut Context,
) -> Result<()> {
    let recorded = Recorded::read(from, renamed)?;
    for process in recorded.processes() {
        let pid = process.pid();
        let records = from.records_of(Kind::Process);
        let was = |record: &crate::record::Record<'_>| {
            record
                .fixed::<ProcessRecord>()
                .is_ok_and(|(fixed, _)| std::ptr::eq(fixed, process.record))
        };
        let mut records = records.filter(was);
        let id = records.next().ok_or(FreezeError::Gone(pid))?.id();
        to.adopt(id);
        let mut record = *process.record;
        if process.is_zombie() {
            to.put(Kind::Process, id, &record, b"")?;
            continue;
        }
        for (directory, name) in [
            (&mut record.state.directory, "cwd"),
            (&mut record.state.root, "root"),
        ] {
            let at = std::fs::metadata(procfs::path(pid, name)).about(pid, "directory")?;
            *directory = [at.dev(), at.ino()];
        }
        to.put(Kind::Process, id, &record, process.directory)?;
        for kind in [Kind::SignalHandlers, Kind::Timers, Kind::PendingSignals] {
            if let Some(record) = from.find(kind, id) {
                to.append(kind, id, &[record.payload()])?;
            }
        }
        let own = process.rights.lines();
        let own = own.filter(|line| !line.starts_with(LOGIN_USER) && !line.starts_with(CGROUP));
        let mut rights: String = own.flat_map(|line| [line, "\n"]).collect();
        rights += &settings::membership(stopped, pid)?;
        to.append(Kind::Credentials, id, &[rights.as_bytes()])?;
        threads(stopped, from, pid, id.raw(), to)?;
    }
    Ok(())
}

fn threads(
    stopped: &Stopped<'_>,
    from: &Context,
    pid: Pid,
    process: u64,
    to: &mut Context,
) -> Result<()> {
    let namespaces = capture::namespaces_of(stopped, pid, pid)?;
    for record in from.records_of(Kind::Thread) {
        let (thread, extended) = record.fixed::<ThreadRecord>()?;
        if thread.process != process {
            continue;
        }
        let id = record.id();
        to.adopt(id);
        let mut thread = *thread;
        if thread.namespaces != Inodes::default() {
            thread.namespaces = namespaces;
        }
        to.put(Kind::Thread, id, &thread, extended)?;
        for kind in [Kind::PendingSignals, Kind::TimeLeft] {
            if let Some(record) = from.find(kind, id) {
                to.append(kind, id, &[record.payload()])?;
            }
        }
    }
    Ok(())
}
