//! What is mounted in the mount namespaces that are the tree's own.
//!
//! What was mounted since is taken down, what was unmounted is mounted again, flags are set back. That is done in the
//! namespace, but not by its processes, so it takes no privilege of theirs. A copy of all mounts (open_tree(2)) keeps file
//! systems that are unmounted, and what is in them. In our own mount namespace nothing is looked at: it is the machine's.
//! Nor is what the machine has mounted into the namespace since, or unmounted there, by propagation; or by removing the
//! mount point, with which a mount goes from all namespaces (Linux 3.18).

use std::collections::{BTreeMap, BTreeSet};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::unistd::Pid;
use serde::{Deserialize, Serialize};

use super::Error;
use super::capture::Capture;
use super::live::Holder;
use super::model::Complaint;
use super::verify::Difference;
use crate::kernel::mount_view::{self, View};
use crate::kernel::mountinfo;
use crate::outcome::Refusal;

/// A mount namespace, as recorded.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Namespace {
    /// A process in it, as refusals name it.
    pub holder: String,
    /// What is mounted, in the order in which it was.
    pub mounts: Vec<Mount>,
}

/// A mount.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Mount {
    /// Its number.
    pub id: u64,
    /// The number of the mount it is in.
    pub parent: u64,
    /// Where it is.
    pub point: PathBuf,
    /// Its flags, as `ro,nosuid`.
    pub flags: String,
    /// What is mounted: device and root, type and source.
    pub what: [String; 4],
    /// Options of the file system.
    pub options: String,
    /// Whether nothing is mounted over it.
    pub visible: bool,
    /// Whether it follows what is mounted outside of the namespace.
    pub slave: bool,
}

/// What is held of a namespace as long as the checkpoint.
#[derive(Debug)]
pub struct Held {
    view: View,
    /// A copy of all mounts.
    copy: OwnedFd,
    /// Which of the mounts the machine had at the same place.
    of_machine: Vec<bool>,
    /// Whether it has changed since it was found to be as recorded.
    changed: std::sync::atomic::AtomicBool,
}

/// What must be done in each namespace where anything must.
#[derive(Debug, Default)]
pub struct Plan(Vec<(usize, Change, Vec<OwnedFd>)>);

/// What must be done in a namespace.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
struct Change {
    /// To take down, in this order.
    remove: Vec<PathBuf>,
    /// Recorded mounts whose flags to set.
    set: Vec<usize>,
    /// Recorded mounts to mount again, in this order.
    add: Vec<usize>,
}

fn text(holder: &str) -> impl Fn(std::io::Error) -> Error {
    let path = format!("mounts of {holder}");
    move |error| Error::Text {
        path: path.clone(),
        problem: error.to_string(),
    }
}

fn own(call: &'static str) -> impl Fn(Errno) -> Error {
    move |errno| Error::Own { call, errno }
}

/// Takes a text of mountinfo apart.
fn read(bytes: &[u8]) -> std::io::Result<Vec<Mount>> {
    let parsed = mountinfo::parse(bytes)?;
    let visible: BTreeSet<u64> = mountinfo::visible(&parsed)
        .into_iter()
        .map(|mount| mount.id)
        .collect();
    let all = String::from_utf8_lossy(bytes);
    let mounts = parsed.into_iter().zip(all.lines()).map(|(mount, line)| {
        let words: Vec<&str> = line.split(' ').collect();
        let word = |at: usize| words.get(at).copied().unwrap_or_default().to_owned();
        let hyphen = words.iter().position(|word| *word == "-");
        let hyphen = hyphen.unwrap_or(words.len());
        Mount {
            id: mount.id,
            parent: mount.parent,
            point: mount.mount_point,
            flags: word(5),
            what: [word(2), word(3), word(hyphen + 1), word(hyphen + 2)],
            options: word(hyphen + 3),
            visible: visible.contains(&mount.id),
            slave: words[..hyphen]
                .iter()
                .any(|word| word.starts_with("master:")),
        }
    });
    Ok(mounts.collect())
}

/// What is mounted in our own namespace.
fn of_machine() -> std::io::Result<Vec<Mount>> {
    read(&std::fs::read("/proc/self/mountinfo")?)
}

/// Whether a mount of another namespace is among these.
fn is_among(mount: &Mount, others: &[Mount]) -> bool {
    let is_it = |other: &Mount| (&other.what, &other.point) == (&mount.what, &mount.point);
    others.iter().any(is_it)
}

/// Those that are not where the machine mounts and unmounts.
fn inner(mounts: &[Mount]) -> impl Iterator<Item = &Mount> {
    let is_slave = |id: u64| mounts.iter().any(|mount| mount.id == id && mount.slave);
    mounts
        .iter()
        .filter(move |mount| !(mount.slave && is_slave(mount.parent)))
}

/// Records the namespaces of a stopped tree's processes.
pub(super) fn capture(
    root: Pid,
    holders: &BTreeMap<i32, Holder>,
) -> Result<(Vec<Namespace>, Vec<Held>), Error> {
    let of = |pid: &str| std::fs::metadata(format!("/proc/{pid}/ns/mnt")).map(|file| file.ino());
    let mut known = BTreeSet::from([of("self").map_err(text("ours"))?]);
    let (mut recorded, mut all_held) = (Vec::new(), Vec::new());
    // The root sees all, others may have another root directory.
    let (first, rest): (Vec<&Holder>, Vec<&Holder>) = holders
        .values()
        .partition(|holder| holder.pid == root.as_raw());
    for holder in first.into_iter().chain(rest) {
        let name = holder.describe();
        if !known.insert(of(&holder.pid.to_string()).map_err(text(&name))?) {
            continue;
        }
        let view = View::open(Pid::from_raw(holder.pid)).map_err(text(&name))?;
        let copy = view.enter(mount_view::copy_all).map_err(own("open_tree"))?;
        let mounts = view.text().and_then(|bytes| read(&bytes));
        let mounts = mounts.map_err(text(&name))?;
        let ours = of_machine().map_err(text("ours"))?;
        all_held.push(Held {
            view,
            copy,
            of_machine: mounts.iter().map(|mount| is_among(mount, &ours)).collect(),
            changed: false.into(),
        });
        recorded.push(Namespace {
            mounts,
            holder: name,
        });
    }
    Ok((recorded, all_held))
}

/// What makes `now` as recorded, or what can't be undone. `is_lost` tells of a mount that is gone whether the machine has
/// taken it away.
fn difference(
    then: &[Mount],
    now: &[Mount],
    is_lost: impl Fn(usize) -> bool,
) -> Result<Change, Complaint> {
    let mut change = Change::default();
    let same = |mount: &Mount, other: &Mount| mount.id == other.id && mount.what == other.what;
    for (index, was) in then.iter().enumerate() {
        if !inner(then).any(|mount| mount.id == was.id) {
            continue;
        }
        let object = || format!("the mount at {}", was.point.display());
        let Some(is) = now.iter().find(|is| same(was, is)) else {
            if is_lost(index) {
                continue;
            }
            if !was.visible {
                let problem = "it was unmounted since the checkpoint, when another was mounted over it; mount it again, then try again";
                return Err((object(), problem.into()));
            }
            change.add.push(index);
            continue;
        };
        if (is.parent, &is.point) != (was.parent, &was.point) {
            let problem = format!(
                "it was moved to {} since the checkpoint; move it back (mount --move), then try again",
                is.point.display()
            );
            return Err((object(), problem));
        }
        if is.options != was.options {
            let problem = format!(
                "its file system had the options `{}` at the checkpoint and has `{}` now; remount it as it was, then try again",
                was.options, is.options
            );
            return Err((object(), problem));
        }
        if is.flags != was.flags {
            if !was.visible {
                let problem = "its flags were changed since the checkpoint, and another mount is over it; set them back, then try again";
                return Err((object(), problem.into()));
            }
            change.set.push(index);
        }
    }
    let new = inner(now).filter(|is| !then.iter().any(|was| same(was, is)));
    change.remove = new.map(|mount| mount.point.clone()).collect();
    // What was mounted last is covered by nothing.
    change.remove.reverse();
    Ok(change)
}

/// Compares the namespaces with what was recorded, and plans, or refuses what can't be undone.
pub fn prepare(capture: &Capture) -> Result<Plan, Error> {
    use std::sync::atomic::Ordering::Relaxed;

    let mut plan = Plan::default();
    for (index, (recorded, held)) in each(capture) {
        if held.view.has_changed().map_err(own("poll"))? {
            held.changed.store(true, Relaxed);
        }
        if !held.changed.load(Relaxed) {
            continue;
        }
        let now = held.read(recorded)?;
        let refuse = |(object, remedy): Complaint| Refusal {
            object,
            holder: recorded.holder.clone(),
            remedy,
        };
        let change = held.difference(recorded, &now).map_err(refuse)?;
        if change == Change::default() {
            held.changed.store(false, Relaxed);
            continue;
        }
        let copies = held.copies(recorded, &change).map_err(refuse)?;
        plan.0.push((index, change, copies));
    }
    Ok(plan)
}

fn each(capture: &Capture) -> impl Iterator<Item = (usize, (&Namespace, &Held))> {
    let recorded = capture.recorded.mounts.iter();
    recorded.zip(&capture.mounts).enumerate()
}

impl Held {
    /// What makes the namespace, where `now` is mounted, as recorded.
    fn difference(&self, recorded: &Namespace, now: &[Mount]) -> Result<Change, Complaint> {
        let ours = std::cell::LazyCell::new(|| of_machine().ok());
        let is_lost = |index: usize| {
            let was = &recorded.mounts[index];
            self.of_machine[index] && ours.as_ref().is_some_and(|ours| !is_among(was, ours))
        };
        difference(&recorded.mounts, now, is_lost)
    }

    fn read(&self, recorded: &Namespace) -> Result<Vec<Mount>, Error> {
        let mounts = self.view.text().and_then(|bytes| read(&bytes));
        mounts.map_err(text(&recorded.holder))
    }

    /// Copies of what is to be mounted again, once it is clear that this can be done.
    fn copies(&self, recorded: &Namespace, change: &Change) -> Result<Vec<OwnedFd>, Complaint> {
        let mounts = || change.add.iter().map(|index| &recorded.mounts[*index]);
        let is_gone = |id: u64| mounts().any(|mount| mount.id == id);
        let mut copies = Vec::with_capacity(change.add.len());
        for mount in mounts() {
            let object = format!("the mount at {}", mount.point.display());
            let has_place = is_gone(mount.parent) || change.covers(&mount.point);
            let tree = self.copy.as_fd();
            let copied = self.view.enter(|| {
                if !has_place {
                    nix::sys::stat::lstat(&mount.point)?;
                }
                mount_view::copy_one(tree, &mount.point)
            });
            copies.push(copied.map_err(|errno| {
                let problem = format!(
                    "it was unmounted since the checkpoint and can't be mounted again: {errno}; mount it again, then try again"
                );
                (object, problem)
            })?);
        }
        Ok(copies)
    }
}

impl Change {
    /// Whether what is taken down hides the path.
    fn covers(&self, path: &Path) -> bool {
        self.remove.iter().any(|point| path.starts_with(point))
    }

    fn carry_out(&self, recorded: &Namespace, copies: &[OwnedFd]) -> Result<(), Errno> {
        for point in &self.remove {
            match mount_view::detach(point) {
                // It has gone with another.
                Ok(()) | Err(Errno::EINVAL | Errno::ENOENT) => {}
                Err(errno) => return Err(errno),
            }
        }
        for (index, copy) in self.add.iter().zip(copies) {
            mount_view::attach(copy.as_fd(), &recorded.mounts[*index].point)?;
        }
        for index in &self.set {
            let mount = &recorded.mounts[*index];
            mount_view::set_flags(&mount.point, &mount.flags)?;
        }
        Ok(())
    }
}

/// Carries out a plan. What was mounted again has another number from now on, which `capture` learns.
pub fn execute(capture: &mut Capture, plan: &Plan) -> Result<(), Error> {
    for (index, change, copies) in &plan.0 {
        let held = &capture.mounts[*index];
        let recorded = &mut capture.recorded.mounts[*index];
        held.view
            .enter(|| change.carry_out(recorded, copies))
            .map_err(own("changing mounts"))?;
        let now = held.read(recorded)?;
        let mut renamed = BTreeMap::new();
        for index in &change.add {
            let was = &mut recorded.mounts[*index];
            let is = now
                .iter()
                .find(|is| is.visible && (&is.point, &is.what) == (&was.point, &was.what));
            if let Some(is) = is {
                renamed.insert(std::mem::replace(&mut was.id, is.id), is.id);
            }
        }
        for index in &change.add {
            let was = &mut recorded.mounts[*index];
            was.parent = *renamed.get(&was.parent).unwrap_or(&was.parent);
        }
        if held.difference(recorded, &now) != Ok(Change::default()) {
            return Err(own("putting mounts back")(Errno::EBUSY));
        }
    }
    Ok(())
}

/// What is not mounted as it was.
pub(super) fn verify(capture: &Capture) -> Result<Vec<Difference>, Error> {
    let mut differences = Vec::new();
    for (_, (recorded, held)) in each(capture) {
        let now = held.read(recorded)?;
        let what = match held.difference(recorded, &now) {
            Ok(change) if change == Change::default() => continue,
            Ok(change) => format!("{change:?} to be done"),
            Err((object, problem)) => format!("{object}: {problem}"),
        };
        differences.push(Difference {
            object: format!("mounts of {}", recorded.holder),
            what,
        });
    }
    Ok(differences)
}

#[cfg(test)]
mod tests {
    use super::*;

    const THEN: &str = "1 0 8:1 / / rw,relatime - ext4 a rw\n\
        2 1 0:2 / /a rw,nosuid - tmpfs t rw,size=1k\n\
        3 2 0:3 / /a/b ro - tmpfs t rw\n\
        4 1 0:4 / /c rw - tmpfs t rw\n\
        5 4 0:5 / /c rw - tmpfs t rw\n\
        6 1 0:6 / /out rw master:1 - tmpfs t rw\n\
        7 6 0:7 / /out/in rw master:2 - tmpfs t rw\n";

    fn change(now: &str) -> Result<Change, Complaint> {
        let [then, now] = [THEN, now].map(|text| read(text.as_bytes()).unwrap());
        difference(&then, &now, |_| false)
    }

    #[test]
    fn what_the_machine_has_taken_away_is_not_missed() {
        let [then, now] = [THEN, &without(3)].map(|text| read(text.as_bytes()).unwrap());
        assert_eq!(
            difference(&then, &now, |index| index == 2),
            Ok(Change::default())
        );
        assert!(is_among(&then[2], &then) && !is_among(&then[2], &now));
    }

    fn without(id: u64) -> String {
        let is_it = |line: &&str| line.starts_with(&format!("{id} "));
        let lines = THEN.lines().filter(|line| !is_it(line));
        lines.flat_map(|line| [line, "\n"]).collect()
    }

    #[test]
    fn what_is_the_same_is_left_alone() {
        assert_eq!(change(THEN), Ok(Change::default()));
    }

    #[test]
    fn new_ones_go_the_last_first() {
        let now = format!("{THEN}8 1 0:8 / /n rw - tmpfs t rw\n9 8 0:9 / /n/m rw - tmpfs t rw\n");
        let expected = Change {
            remove: vec!["/n/m".into(), "/n".into()],
            ..Change::default()
        };
        assert_eq!(change(&now), Ok(expected));
    }

    #[test]
    fn those_that_are_gone_come_back_also_if_their_number_is_anothers() {
        let gone = Change {
            add: vec![2],
            ..Change::default()
        };
        assert_eq!(change(&without(3)), Ok(gone.clone()));
        let now = without(3) + "3 1 0:8 / /x rw - tmpfs t rw\n";
        let expected = Change {
            remove: vec!["/x".into()],
            ..gone
        };
        assert_eq!(change(&now), Ok(expected));
    }

    #[test]
    fn flags_are_set_and_the_rest_is_refused() {
        let set = Change {
            set: vec![1],
            ..Change::default()
        };
        assert_eq!(change(&THEN.replace("nosuid", "ro")), Ok(set));
        for (was, is) in [
            ("size=1k", "size=2k"),
            ("/a/b ro", "/b ro"),
            ("3 2 ", "3 1 "),
        ] {
            assert!(change(&THEN.replacen(was, is, 1)).is_err(), "{is}");
        }
        // 4 is below 5.
        assert!(change(&without(4)).is_err());
        assert!(change(&THEN.replacen("/c rw", "/c ro", 1)).is_err());
    }

    #[test]
    fn what_the_machine_mounts_is_left_alone() {
        assert_eq!(change(&without(7)), Ok(Change::default()));
        let now = format!("{THEN}8 6 0:8 / /out/more rw master:3 - tmpfs t rw\n");
        assert_eq!(change(&now), Ok(Change::default()));
        let now = format!("{THEN}8 1 0:8 / /copy rw master:3 - tmpfs t rw\n");
        assert_eq!(change(&now).unwrap().remove, [PathBuf::from("/copy")]);
    }
}
