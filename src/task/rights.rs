//! Credentials of a process that is made again: it begins with those of its parent, and can give up what it did not have.

use nix::unistd::Pid;

use crate::freeze::Stopped;
use crate::kernel::namespaces::KINDS;
use crate::kernel::procfs;

use super::Result;
use super::capture::{self, FEATURES};
use super::layout::Rights;
use super::probe::CAPABILITY_VERSION_3;
use super::recorded::RecordedProcess;
use super::settings::{CGROUP, LOGIN_USER};
use super::steps::Steps;

const CAP_SETGID: u64 = 1 << 6;
const CAP_SETUID: u64 = 1 << 7;
const CAP_SETPCAP: u64 = 1 << 8;
const CAPABILITIES: u64 = 64;
const PR_CAP_AMBIENT: i32 = 47;
const PR_CAP_AMBIENT_RAISE: i32 = 2;
const PR_CAP_AMBIENT_CLEAR_ALL: i32 = 4;

/// The lines of `/proc/PID/status` that are recorded.
#[derive(Clone, Copy)]
struct Lines<'a>(&'a str);

impl<'a> Lines<'a> {
    fn get(self, key: &str) -> &'a str {
        procfs::status_line(self.0, key).unwrap_or_default()
    }

    fn set(self, key: &str) -> u64 {
        u64::from_str_radix(self.get(key), 16).unwrap_or(0)
    }

    fn numbers(self, key: &str) -> Vec<u32> {
        let words = self.get(key).split_ascii_whitespace();
        words.filter_map(|word| word.parse().ok()).collect()
    }
}

fn rights<'p>(process: &'p RecordedProcess<'_>) -> Option<&'p Rights> {
    let leader = process.threads.get(&process.pid())?;
    Some(&leader.record.state.rights)
}

/// Where a child of the process is from the start, and stays.
fn membership(rights: &str) -> impl Iterator<Item = &str> {
    let of_interest = |line: &&str| line.starts_with(LOGIN_USER) || line.starts_with(CGROUP);
    rights.lines().filter(of_interest)
}

/// Why a child of `maker` can't have the credentials and filters of `process`, if it can't.
pub(super) fn obstacle(
    process: &RecordedProcess<'_>,
    maker: &RecordedProcess<'_>,
) -> Option<&'static str> {
    let (was, makers) = (Lines(process.rights), Lines(maker.rights));
    let (Some(own), Some(of_maker)) = (rights(process), rights(maker)) else {
        return Some("nothing is known of its credentials");
    };
    if ["Seccomp", "Seccomp_filters", FEATURES]
        .iter()
        .any(|key| was.get(key) != makers.get(key))
    {
        return Some("it had other seccomp filters than its parent");
    }
    if membership(process.rights).ne(membership(maker.rights)) {
        return Some("it had another login user id or was in other cgroups than its parent");
    }
    if own.secure_bits != of_maker.secure_bits || own.no_new_privileges < of_maker.no_new_privileges
    {
        return Some("it had other secure bits than its parent");
    }
    if process
        .threads
        .values()
        .any(|thread| thread.record.state.rights != *own)
    {
        return Some("its threads had different credentials");
    }
    let [bounding, permitted, inheritable] =
        ["CapBnd", "CapPrm", "CapInh"].map(|key| (was.set(key), makers.set(key)));
    let can = makers.set("CapEff");
    if permitted.0 & !permitted.1 != 0
        || bounding.0 & !bounding.1 != 0
        || inheritable.0 & !(inheritable.1 | permitted.1) != 0
        || (bounding.0 != bounding.1 && can & CAP_SETPCAP == 0)
    {
        return Some("it had capabilities that its parent has not");
    }
    let apart = |key| {
        let ids = was.numbers(key);
        ids.get(1) != ids.get(3)
    };
    let other_groups =
        was.get("Gid") != makers.get("Gid") || was.get("Groups") != makers.get("Groups");
    if (was.get("Uid") != makers.get("Uid") && can & CAP_SETUID == 0)
        || (other_groups && can & CAP_SETGID == 0)
        || apart("Uid")
        || apart("Gid")
    {
        return Some("it had another user or group than its parent, which may not change them");
    }
    let user = KINDS.iter().position(|kind| *kind == "user");
    let namespace = user.zip(process.threads.get(&process.pid()));
    let lives_in = namespace.map(|(user, leader)| leader.record.namespaces[user]);
    if was.get("Groups") != makers.get("Groups") && lives_in != own_user_namespace() {
        return Some("it had other groups than its parent, in a user namespace");
    }
    None
}

/// Whether a child of `maker` may be told which program it is (`PR_SET_MM_EXE_FILE`).
pub fn may_set_program(maker: &RecordedProcess<'_>) -> bool {
    const CAP_SYS_ADMIN: u64 = 1 << 21;
    const CAP_CHECKPOINT_RESTORE: u64 = 1 << 40;
    Lines(maker.rights).set("CapEff") & (CAP_SYS_ADMIN | CAP_CHECKPOINT_RESTORE) != 0
}

/// Whether a process has the same capabilities as before when it has executed a program (capabilities(7)).
pub fn keeps_rights(process: &RecordedProcess<'_>) -> bool {
    let lines = Lines(process.rights);
    let [permitted, effective, bounding, inheritable, ambient] =
        ["CapPrm", "CapEff", "CapBnd", "CapInh", "CapAmb"].map(|key| lines.set(key));
    rights(process).is_some_and(|rights| {
        // In its own user namespace, unlike the lines.
        let gets = match rights.users {
            [0, 0, 0] => bounding | inheritable,
            _ => ambient,
        };
        rights.secure_bits == 0 && (permitted, effective) == (gets, gets)
    })
}

/// Whether a process that was made again, and has executed a program, has the rights of its parent.
pub fn has_rights_of(stopped: &Stopped<'_>, pid: Pid, maker: &RecordedProcess<'_>) -> Result<bool> {
    Ok(capture::rights(stopped, pid)? == maker.rights)
}

fn own_user_namespace() -> Option<u64> {
    use std::os::unix::fs::MetadataExt;
    Some(std::fs::metadata("/proc/self/ns/user").ok()?.ino())
}

/// Gives up what a process that was made again, and has the credentials `makers`, did not have.
pub(super) fn give_up(
    stopped: &mut Stopped<'_>,
    pid: Pid,
    process: &RecordedProcess<'_>,
    makers: &str,
) -> Result<()> {
    let (was, makers) = (Lines(process.rights), Lines(makers));
    let (Some(own), false) = (rights(process), process.rights == makers.0) else {
        return Ok(());
    };
    let mut steps = Steps::new(pid);
    let excess = makers.set("CapBnd") & !was.set("CapBnd");
    for capability in (0..CAPABILITIES).filter(|number| excess & 1 << number != 0) {
        let what = "prctl PR_CAPBSET_DROP";
        steps.prctl(what, libc::PR_CAPBSET_DROP, capability.into());
    }
    let what = "prctl PR_SET_KEEPCAPS";
    steps.prctl(what, libc::PR_SET_KEEPCAPS, 1.into());
    if was.get("Groups") != makers.get("Groups") {
        let groups = was.numbers("Groups");
        let list: Vec<u8> = groups
            .iter()
            .flat_map(|group| group.to_ne_bytes())
            .collect();
        let list = steps.batch.input(&list);
        steps.call(
            "setgroups",
            libc::SYS_setgroups,
            &[groups.len().into(), list],
        );
    }
    steps.call(
        "setresgid",
        libc::SYS_setresgid,
        &own.groups.map(Into::into),
    );
    steps.call("setresuid", libc::SYS_setresuid, &own.users.map(Into::into));
    let header = steps
        .batch
        .input(zerocopy::IntoBytes::as_bytes(&[CAPABILITY_VERSION_3, 0]));
    let sets = steps
        .batch
        .input(zerocopy::IntoBytes::as_bytes(&own.capabilities));
    steps.call("capset", libc::SYS_capset, &[header, sets]);
    let ambient = |steps: &mut Steps, operation: i32, capability: u64| {
        let zero = 0.into();
        steps.call(
            "prctl PR_CAP_AMBIENT",
            libc::SYS_prctl,
            &[
                PR_CAP_AMBIENT.into(),
                operation.into(),
                capability.into(),
                zero,
                zero,
            ],
        );
    };
    ambient(&mut steps, PR_CAP_AMBIENT_CLEAR_ALL, 0);
    let kept = was.set("CapAmb");
    for capability in (0..CAPABILITIES).filter(|number| kept & 1 << number != 0) {
        ambient(&mut steps, PR_CAP_AMBIENT_RAISE, capability);
    }
    if own.no_new_privileges != 0 {
        let what = "prctl PR_SET_NO_NEW_PRIVS";
        steps.prctl(what, libc::PR_SET_NO_NEW_PRIVS, 1.into());
    }
    steps.run(stopped, pid)
}
