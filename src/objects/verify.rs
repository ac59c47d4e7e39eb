//! The oracle: what differs between the descriptors of a stopped tree and the records, in words.
//!
//! Apart from the rest of this room: nothing runs in the target, all is read from the text of `/proc`, with kcmp(2), and
//! through duplicates.

use std::cmp::Ordering;
use std::collections::BTreeMap;
use std::os::unix::fs::MetadataExt;

use nix::unistd::Pid;

use super::capture::{Capture, check_threads, every_number, holders};
use super::fdinfo::Fdinfo;
use super::file::Form;
use super::live::{Glance, Holder, Live};
use super::model::{Common, Description, ObjectId, Place, Recorded, SETTABLE_FLAGS, Slot, Table};
use super::pipe;
use super::state::State;
use super::{Error, epoll, eventfd, file, inotify, locks, mounts, signalfd, socket_diag, timerfd};
use crate::freeze::Stopped;
use crate::kernel::kcmp;

/// A difference between a checkpoint and what is there.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Difference {
    /// Whose, as `fd 7 of pid 12 (redis-server)`.
    pub object: String,
    /// What differs.
    pub what: String,
}

impl std::fmt::Display for Difference {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}: {}", self.object, self.what)
    }
}

/// Compares all descriptors of a stopped tree with the records.
pub fn verify(stopped: &Stopped<'_>, capture: &Capture) -> Result<Vec<Difference>, Error> {
    check_threads(stopped)?;
    let holders = holders(stopped, &capture.recorded.names);
    let mut oracle = Oracle {
        recorded: &capture.recorded,
        holders: &holders,
        places: capture.recorded.first_places(),
        differences: Vec::new(),
    };
    for table in &capture.recorded.tables {
        oracle.sharing(table)?;
        oracle.numbers(table)?;
    }
    oracle.descriptions()?;
    oracle.pipes()?;
    oracle.locks()?;
    oracle.terminals()?;
    socket_diag::close();
    oracle.differences.extend(mounts::verify(capture)?);
    Ok(oracle.differences)
}

/// The flags that matter after open(2). The others (`O_NOFOLLOW`, `O_TMPFILE` …) are shown as well, but another description
/// of the same file can't be given them again.
const LASTING_FLAGS: i32 =
    libc::O_ACCMODE | libc::O_PATH | libc::O_SYNC | libc::O_DSYNC | SETTABLE_FLAGS;

struct Oracle<'a> {
    recorded: &'a Recorded,
    holders: &'a BTreeMap<i32, Holder>,
    /// The first place of every description.
    places: BTreeMap<ObjectId, Place>,
    differences: Vec<Difference>,
}

/// The numbers that `/proc/PID/fdinfo` lists.
fn listed(pid: i32) -> Result<Vec<i32>, Error> {
    let path = format!("/proc/{pid}/fdinfo");
    let text = |problem: String| Error::Text {
        path: path.clone(),
        problem,
    };
    let entries = std::fs::read_dir(&path).map_err(|error| text(error.to_string()))?;
    let mut numbers = entries
        .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok())
        .collect::<Vec<i32>>();
    numbers.sort_unstable();
    Ok(numbers)
}

impl Oracle<'_> {
    fn differ(&mut self, object: String, what: String) {
        self.differences.push(Difference { object, what });
    }

    fn name(&self, place: Place) -> String {
        format!("fd {} of {}", place.fd, self.recorded.holder(place.pid))
    }

    fn compare(&self, one: Place, other: Place) -> Result<Ordering, Error> {
        let at = |place: Place| (Pid::from_raw(place.pid), place.fd);
        kcmp::files(at(one), at(other)).map_err(|errno| Error::Descriptor {
            what: format!("fd {}", one.fd),
            pid: one.pid,
            call: "kcmp",
            errno,
        })
    }

    /// Which processes have this table.
    fn sharing(&mut self, table: &Table<ObjectId>) -> Result<(), Error> {
        for &pid in self.holders.keys() {
            let pids = (Pid::from_raw(table.pid()), Pid::from_raw(pid));
            let shared =
                kcmp::same(pids.0, pids.1, kcmp::Shared::Files).map_err(|errno| Error::Own {
                    call: "kcmp",
                    errno,
                })?;
            if shared != table.holders.contains(&pid) {
                let what = if shared {
                    "is shared with"
                } else {
                    "is no more shared with"
                };
                let object = format!("file table of {}", self.recorded.holder(table.pid()));
                self.differ(object, format!("{what} {}", self.recorded.holder(pid)));
            }
        }
        Ok(())
    }

    /// The numbers of a table, their close-on-exec bits and that each has its description.
    fn numbers(&mut self, table: &Table<ObjectId>) -> Result<(), Error> {
        let pid = table.pid();
        let open = listed(pid)?;
        for &fd in open.iter().filter(|fd| table.at(**fd).is_none()) {
            let link = std::fs::read_link(format!("/proc/{pid}/fd/{fd}")).unwrap_or_default();
            self.differ(
                self.name(Place { pid, fd }),
                format!("is open: {}", link.display()),
            );
        }
        for slot in &table.slots {
            let place = Place { pid, fd: slot.fd };
            if open.binary_search(&slot.fd).is_err() {
                self.differ(self.name(place), "is closed".into());
                continue;
            }
            let flags = Fdinfo::read(pid, slot.fd)?.octal("flags")?;
            if (flags & libc::O_CLOEXEC as u64 != 0) != slot.close_on_exec {
                self.differ(self.name(place), "has another close-on-exec bit".into());
            }
            self.description_at(slot, place)?;
        }
        Ok(())
    }

    /// That a number has its description and not that of a neighbour.
    fn description_at(&mut self, slot: &Slot<ObjectId>, place: Place) -> Result<(), Error> {
        let first = self.places.get(&slot.description).copied();
        if let Some(first) = first
            && first != place
            && self.is_open(first)
            && self.compare(first, place)? != Ordering::Equal
        {
            let other = self.name(first);
            self.differ(
                self.name(place),
                format!("is not the same description as {other}"),
            );
        }
        Ok(())
    }

    fn is_open(&self, place: Place) -> bool {
        std::fs::symlink_metadata(format!("/proc/{}/fd/{}", place.pid, place.fd)).is_ok()
    }

    /// Every description, once.
    fn descriptions(&mut self) -> Result<(), Error> {
        let mut by_inode: BTreeMap<(u64, u64), Vec<Place>> = BTreeMap::new();
        for (id, description) in &self.recorded.descriptions {
            let place = self.places.get(id).copied();
            let Some(place) = place.filter(|place| self.is_open(*place)) else {
                continue;
            };
            by_inode
                .entry(description.common.inode())
                .or_default()
                .push(place);
            let is_ours = !self.recorded.shared_outside.contains(id);
            let offset = Some(description.common.offset).filter(|at| *at >= 0 && is_ours);
            for what in self.description(description, offset, place)? {
                self.differ(self.name(place), what);
            }
        }
        // Different ones must not have become the same: sorted, equal ones are neighbours.
        for mut places in by_inode.into_values() {
            let mut failed = Ok(());
            let mut compare = |one: Place, other: Place| {
                self.compare(one, other).unwrap_or_else(|error| {
                    failed = Err(error);
                    Ordering::Equal
                })
            };
            places.sort_by(|one, other| compare(*one, *other));
            let same: Vec<_> = places
                .windows(2)
                .filter(|pair| compare(pair[0], pair[1]) == Ordering::Equal)
                .map(|pair| (pair[0], pair[1]))
                .collect();
            failed?;
            for (one, other) in same {
                let other = self.name(other);
                self.differ(
                    self.name(one),
                    format!("is the same description as {other}"),
                );
            }
        }
        Ok(())
    }

    /// `at_offset` is the offset, if that goes back.
    fn description(
        &self,
        then: &Description,
        at_offset: Option<i64>,
        place: Place,
    ) -> Result<Vec<String>, Error> {
        let path = format!("/proc/{}/fd/{}", place.pid, place.fd);
        let info = Fdinfo::read(place.pid, place.fd)?;
        let at = match then.common.file_type() {
            // Following the link of a symbolic link's own descriptor would lead to what it points to.
            libc::S_IFLNK => None,
            _ => Some(std::fs::metadata(&path).map_err(|error| Error::Text {
                path: path.clone(),
                problem: error.to_string(),
            })?),
        };
        let mut differences = Vec::new();
        let flags = info.octal("flags")? as i32;
        let (now, recorded) = (flags & LASTING_FLAGS, then.common.flags & LASTING_FLAGS);
        if now != recorded {
            differences.push(format!("flags {now:o} instead of {recorded:o}"));
        }
        let offset: i64 = info.number("pos")?;
        if let Some(expected) = at_offset.filter(|expected| *expected != offset) {
            differences.push(format!("offset {offset} instead of {expected}"));
        }
        if let Some(at) = at
            && (at.dev(), at.ino()) != then.common.inode()
        {
            let link = std::fs::read_link(&path).unwrap_or_default();
            differences.push(format!("is {}", link.display()));
            return Ok(differences);
        }
        let common = Common {
            flags,
            offset,
            ..then.common
        };
        let Some(holder) = self.holders.get(&place.pid) else {
            return Ok(differences);
        };
        let live = Live::new(holder, place.fd, common, Glance::default());
        differences.extend(kind(&then.state, &live)?);
        Ok(differences)
    }

    /// Capacity and content of the internal pipes.
    fn pipes(&mut self) -> Result<(), Error> {
        for (inode, then) in &self.recorded.pipes {
            let Some(content) = &then.content else {
                continue;
            };
            let ends: Vec<(Place, bool)> = self
                .recorded
                .descriptions
                .iter()
                .filter(|(_, end)| {
                    matches!(end.state, State::Pipe(_)) && end.common.inode() == *inode
                })
                .filter_map(|(id, end)| {
                    let place = *self.places.get(id)?;
                    self.is_open(place)
                        .then_some((place, end.common.can_read()))
                })
                .collect();
            let Some(&(place, can_read)) = ends.iter().max_by_key(|(_, can_read)| *can_read) else {
                continue;
            };
            let Some(holder) = self.holders.get(&place.pid) else {
                continue;
            };
            let duplicate = holder.duplicate(place.fd)?;
            let capacity = pipe::capacity(&duplicate)?;
            if capacity != then.capacity {
                let what = format!("pipe capacity {capacity} instead of {}", then.capacity);
                self.differ(self.name(place), what);
            }
            if can_read {
                let now = pipe::content(&duplicate)?;
                if now != *content {
                    let what = format!(
                        "pipe with {} bytes in it, other than the {} recorded",
                        now.bytes.len(),
                        content.bytes.len()
                    );
                    self.differ(self.name(place), what);
                }
            }
        }
        Ok(())
    }

    fn terminals(&mut self) -> Result<(), Error> {
        for terminal in &self.recorded.terminals {
            let place = |id| self.places.get(&id).copied();
            let duplicate = |id| {
                let holder =
                    place(id).and_then(|place| Some((self.holders.get(&place.pid)?, place.fd)));
                let (holder, fd) = holder.ok_or(Error::Own {
                    call: "finding a terminal",
                    errno: nix::errno::Errno::EBADF,
                })?;
                holder.duplicate(fd)
            };
            let differences = terminal.compare(duplicate)?;
            let name = place(terminal.any).map_or_else(String::new, |place| self.name(place));
            for what in differences {
                self.differ(name.clone(), what);
            }
        }
        Ok(())
    }

    fn locks(&mut self) -> Result<(), Error> {
        let numbers = every_number(&self.recorded.tables)
            .filter(|(place, ..)| self.is_open(*place))
            .map(|(place, id, holders)| {
                let common = self.recorded.descriptions[&id].common;
                (id, common, place, holders)
            });
        let now = locks::held(numbers)?;
        if now != self.recorded.locks {
            let what = format!("{now:?} instead of {:?}", self.recorded.locks);
            self.differ("file locks".into(), what);
        }
        Ok(())
    }
}

/// What differs in what a kind adds.
fn kind(then: &State, live: &Live<'_>) -> Result<Vec<String>, Error> {
    let unless = |same: bool, what: String| if same { Vec::new() } else { vec![what] };
    Ok(match then {
        State::File(then) => {
            let now = file::capture(live)?;
            let same_form = now.form == then.form && now.seals == then.seals;
            let has_path = !matches!(then.form, Form::Plain);
            unless(
                same_form && (!has_path || now.path == then.path),
                format!("is {now:?} instead of {then:?}"),
            )
        }
        State::Pipe(_) => Vec::new(),
        State::Eventfd(then) => {
            let now = eventfd::capture(live)?;
            unless(now == *then, format!("{now:?} instead of {then:?}"))
        }
        State::Signalfd(then) => {
            let now = signalfd::capture(live)?;
            unless(now == *then, format!("{now:?} instead of {then:?}"))
        }
        State::Timerfd(then) => then.compare(&timerfd::capture(live)?),
        State::Epoll(then) => then.compare(&epoll::capture(live)?),
        State::Inotify(then) => {
            let now = inotify::read(live)?;
            unless(
                now.watches == then.watches && now.unread == 0,
                format!("{now:?} instead of {then:?}"),
            )
        }
        State::Socket(then) => then.verify(live)?,
    })
}
