//! Descriptors that were recorded elsewhere, for a tree that was made of their records: files are found by their paths, and
//! what led outside of the container by its init's standard streams leads to those of the new one.

use std::collections::BTreeMap;
use std::fs::{File, Permissions};
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, SealFlag, fcntl};

use super::Error;
use super::capture::Capture;
use super::epoll;
use super::file::{self, Form};
use super::model::{Complaint, Description, Inode, ObjectId, Recorded};
use super::reborn::{Reborn, reborn};
use super::records;
use super::state::State;
use super::sysv::Sysv;
use crate::freeze::LEAST_NO_PID;
use crate::kernel::confined;
use crate::record::{self, Context, Kind};

/// A recorded process that was made.
#[derive(Debug, Clone)]
pub struct Made {
    /// Its PID and the inode of its pidfds as recorded.
    pub was: (i32, u64),
    /// Those that it has.
    pub is: (i32, u64),
    /// Its command name.
    pub name: String,
}

/// No pipe has an inode of so great a number, which is counted from 1.
const NO_PIPE: u64 = 1 << 63;

/// Refuses what a context holds of descriptors that can't be made of its record alone.
///
/// # Errors
///
/// Refused by name; or a record does not read as it should.
pub fn check_transplant(context: &Context, names: &BTreeMap<i32, String>) -> Result<(), Error> {
    let mut recorded = records::read(context)?;
    recorded.names = names.clone();
    check_references(&recorded)?;
    for (id, description) in &recorded.descriptions {
        if let Err(complaint) = check(description) {
            return Err(recorded.refuse(*id, complaint).into());
        }
    }
    let refuse = |object: &str| crate::outcome::Refusal {
        object: object.into(),
        holder: "the container".into(),
        remedy: "it can't be made of an image yet; take the checkpoint without it".into(),
    };
    if recorded.sysv.semaphores.len() + recorded.sysv.queues.len() > 0 {
        return Err(refuse("System V semaphores or message queues").into());
    }
    if let Some(table) = recorded.tables.iter().find(|table| table.holders.len() > 1) {
        return Err(crate::outcome::Refusal {
            object: "its file table, which it shared with another process (CLONE_FILES)".into(),
            holder: recorded.holder(table.pid()),
            remedy: "it can't be made of an image yet; take the checkpoint without it".into(),
        }
        .into());
    }
    if !recorded.terminals.is_empty() {
        return Err(refuse("a terminal").into());
    }
    Ok(())
}

/// Whether what refers to descriptions and processes refers to some that there are.
fn check_references(recorded: &Recorded) -> Result<(), Error> {
    let damaged = |kind, id, problem: String| record::Error::Payload { kind, id, problem };
    for table in &recorded.tables {
        let mut last = -1;
        for slot in &table.slots {
            if !recorded.descriptions.contains_key(&slot.description) {
                let problem = format!("fd {} leads to it, and there is none", slot.fd);
                return Err(damaged(Kind::FileTable, slot.description, problem).into());
            }
            if slot.fd <= last {
                let problem = format!("fd {} after fd {last}", slot.fd);
                return Err(damaged(Kind::FileTable, slot.description, problem).into());
            }
            last = slot.fd;
        }
        let is_known = |pid: &&i32| recorded.names.contains_key(pid);
        if let Some(pid) = table.holders.iter().find(|pid| !is_known(pid)) {
            let problem = format!("a table of process {pid}, and there is none");
            return Err(damaged(Kind::FileTable, ObjectId::IMAGE, problem).into());
        }
    }
    for (id, description) in &recorded.descriptions {
        let State::Epoll(epoll) = &description.state else {
            continue;
        };
        for entry in &epoll.entries {
            let watched = entry.watches;
            if watched.is_none_or(|watched| !recorded.descriptions.contains_key(&watched)) {
                let problem = format!("what it watches as fd {} is none", entry.fd);
                return Err(damaged(Kind::Epoll, *id, problem).into());
            }
        }
    }
    Ok(())
}

fn check(description: &Description) -> Result<(), Complaint> {
    let not_yet = |what: &str| {
        let remedy = "it can't be made of an image yet; take the checkpoint when it is closed";
        Err((what.to_owned(), remedy.to_owned()))
    };
    match &description.state {
        State::File(file) => match file.form {
            Form::Plain if file.path.starts_with("/proc/") => not_yet(&file.path),
            Form::Plain if is_nameless(file) && description.common.file_type() != libc::S_IFREG => {
                not_yet(&file.path)
            }
            Form::Plain | Form::Memfd | Form::Device | Form::Process(_) => Ok(()),
            Form::Terminal | Form::Master | Form::Kept => not_yet(&file.path),
        },
        State::Pipe(pipe) if pipe.fifo.as_deref().is_some_and(is_deleted) => {
            not_yet("a FIFO that was deleted")
        }
        State::Inotify(inotify) if !inotify.watches.is_empty() => not_yet("an inotify instance"),
        _ => Ok(()),
    }
}

/// Whether it has no name that could lead to it.
fn is_nameless(file: &file::State) -> bool {
    file.form == Form::Memfd || file.pinned || is_deleted(&file.path)
}

fn is_deleted(path: &str) -> bool {
    path.ends_with(" (deleted)")
}

/// Files that were made for descriptions which had none with a name: by inode as recorded, and which description is of which
/// inode, where its record says another.
#[derive(Debug, Clone, Copy)]
pub struct Nameless<'a> {
    /// The files.
    pub files: &'a BTreeMap<Inode, File>,
    /// The descriptions.
    pub descriptions: &'a BTreeMap<ObjectId, Inode>,
    /// Other names of files whose descriptions were opened by a name that was deleted since.
    pub linked: &'a BTreeMap<Inode, PathBuf>,
}

impl Nameless<'_> {
    /// The file of a description, as it is to be.
    fn file(&self, id: ObjectId, was: &Description, state: &file::State) -> std::io::Result<File> {
        let inode = was.common.inode();
        let inode = self.descriptions.get(&id).unwrap_or(&inode);
        let file = self.files.get(inode).ok_or(Errno::ENOENT)?;
        if state.form == Form::Memfd {
            // Before it is sealed, which may be for its mode too.
            file.set_permissions(Permissions::from_mode(was.common.mode & 0o7777))?;
            let seals = SealFlag::from_bits_retain(state.seals);
            fcntl(file.as_raw_fd(), FcntlArg::F_ADD_SEALS(seals))?;
        }
        let path = format!("/proc/self/fd/{}", file.as_raw_fd());
        File::options()
            .read(true)
            .custom_flags(libc::O_PATH)
            .open(path)
    }
}

/// Makes of the records in `context` the descriptors of a tree whose root, this process with this root directory, has been
/// captured as `live` while it had its standard streams only.
///
/// # Errors
///
/// Refused by name where a file is not there, or what led outside leads nowhere.
pub fn transplant(
    context: &Context,
    live: Capture,
    made: &[Made],
    nameless: Nameless<'_>,
    (root, directory): (i32, BorrowedFd<'_>),
) -> Result<Capture, Error> {
    let mut capture = Capture {
        recorded: records::read(context)?,
        pins: BTreeMap::new(),
        mounts: live.mounts,
    };
    for process in made {
        let name = process.name.clone();
        capture.recorded.names.insert(process.was.0, name);
    }
    // Old numbers may be new ones of others: so they are all taken out of the way first.
    let mut rename = |was, is| {
        // No file is pinned yet, so that the number in a path means nothing.
        let number = 0;
        reborn(&mut capture, Reborn { was, is, number });
    };
    let between = |(was, inode): (i32, u64)| (was + LEAST_NO_PID, inode);
    made.iter()
        .for_each(|process| rename(process.was, between(process.was)));
    made.iter()
        .for_each(|process| rename(between(process.was), process.is));
    capture.recorded.mounts = live.recorded.mounts.clone();
    capture.recorded.sysv = Sysv {
        own_namespace: live.recorded.sysv.own_namespace,
        ..Sysv::default()
    };
    take_pipes_out_of_the_way(&mut capture.recorded);
    let streams = streams(&capture.recorded, root);
    let mut moved: BTreeMap<Inode, Inode> = BTreeMap::new();
    let ids: Vec<ObjectId> = capture.recorded.descriptions.keys().copied().collect();
    for id in ids {
        let description = &capture.recorded.descriptions[&id];
        let place = place(&capture.recorded, id, description, nameless, directory);
        match place {
            Ok(None) => {}
            Ok(Some((is, pin))) => {
                if let Some(description) = capture.recorded.descriptions.get_mut(&id) {
                    moved.insert(description.common.inode(), is);
                    (description.common.dev, description.common.ino) = is;
                }
                capture.pins.extend(pin.map(|pin| (id, pin)));
            }
            Err(complaint) => {
                let stream = streams.get(&id).and_then(|fd| stream(&live.recorded, *fd));
                let Some((of, description)) = stream else {
                    return Err(capture.recorded.refuse(id, complaint).into());
                };
                let inode = description.common.inode();
                let pipe = live.recorded.pipes.get(&inode);
                let pipe = pipe.map(|pipe| (inode, pipe.clone()));
                capture.recorded.pipes.extend(pipe);
                capture
                    .recorded
                    .descriptions
                    .insert(id, description.clone());
                if let Some(pin) = live.pins.get(&of).and_then(|pin| pin.try_clone().ok()) {
                    capture.pins.insert(id, pin);
                }
            }
        }
    }
    tell_watchers(&mut capture.recorded);
    for lock in &mut capture.recorded.locks {
        lock.inode = *moved.get(&lock.inode).unwrap_or(&lock.inode);
    }
    for (was, is) in moved {
        if let Some(mut pipe) = capture.recorded.pipes.remove(&was) {
            pipe.inode = is;
            capture.recorded.pipes.insert(is, pipe);
        }
    }
    Ok(capture)
}

/// Has epoll instances know the inodes that what they watch has now.
fn tell_watchers(recorded: &mut Recorded) {
    let inodes: BTreeMap<ObjectId, Inode> = recorded
        .descriptions
        .iter()
        .map(|(id, description)| (*id, description.common.inode()))
        .collect();
    for description in recorded.descriptions.values_mut() {
        let State::Epoll(state) = &mut description.state else {
            continue;
        };
        for entry in &mut state.entries {
            let watched = entry.watches.and_then(|id| inodes.get(&id));
            if let Some((device, inode)) = watched {
                entry.inode = (epoll::kernel_device(*device), *inode);
            }
        }
    }
}

/// Where a description leads in the new container: `None`, it will be made; or the inode, and a pin of it.
type Found = Result<Option<(Inode, Option<OwnedFd>)>, Complaint>;

fn place(
    recorded: &Recorded,
    id: ObjectId,
    description: &Description,
    nameless: Nameless<'_>,
    root: BorrowedFd<'_>,
) -> Found {
    let linked = nameless.linked.get(&description.common.inode());
    let path = match &description.state {
        State::File(file) if is_nameless(file) && linked.is_some() => {
            linked.map_or_else(String::new, |path| path.to_string_lossy().into_owned())
        }
        State::File(file) if is_nameless(file) => {
            let made = nameless.file(id, description, file);
            let found = made.and_then(|made| Ok((made.metadata()?, made)));
            return match found {
                Ok((at, made)) => Ok(Some(((at.dev(), at.ino()), Some(made.into())))),
                Err(error) => Err((
                    file.path.clone(),
                    format!("it can't be made of the image: {error}"),
                )),
            };
        }
        State::File(file) => match file.form {
            Form::Process(_) => return Ok(None),
            _ => file.path.clone(),
        },
        State::Pipe(pipe) => match &pipe.fifo {
            Some(path) => path.clone(),
            None => {
                let pipe = recorded.pipes.get(&description.common.inode());
                return match pipe.is_some_and(|pipe| pipe.content.is_some()) {
                    true => Ok(None),
                    false => Err((
                        "pipe".into(),
                        "its other end was outside of the container, and it is none of its init's standard streams".into(),
                    )),
                };
            }
        },
        _ => return Ok(None),
    };
    let missing = |problem: String| {
        let remedy = format!("{problem}; put it there, then try again");
        (path.clone(), remedy)
    };
    let opened = confined::open(root, Path::new(&path), OFlag::O_PATH | OFlag::O_NOFOLLOW);
    let opened: File = opened
        .map_err(|errno| missing(format!("it is not in the container: {errno}")))?
        .into();
    let at = opened
        .metadata()
        .map_err(|error| missing(error.to_string()))?;
    if at.mode() & libc::S_IFMT != description.common.file_type()
        || at.rdev() != description.common.rdev
    {
        return Err(missing("it is something else in the container".into()));
    }
    let pin = file::may_be_pinned(&description.state, &description.common).then(|| opened.into());
    Ok(Some(((at.dev(), at.ino()), pin)))
}

/// The descriptions that are standard streams of the root, by number.
fn streams(recorded: &Recorded, root: i32) -> BTreeMap<ObjectId, i32> {
    let tables = recorded.tables.iter();
    let of_root = tables.filter(|table| table.holders.contains(&root));
    let slots = of_root.flat_map(|table| &table.slots);
    let streams = slots.filter(|slot| slot.fd <= libc::STDERR_FILENO);
    streams.map(|slot| (slot.description, slot.fd)).collect()
}

/// What a number of the live root leads to.
fn stream(live: &Recorded, fd: i32) -> Option<(ObjectId, &Description)> {
    let slot = live.tables.first()?.at(fd)?;
    let description = live.descriptions.get(&slot.description)?;
    Some((slot.description, description))
}

/// Pipes have numbers of their own for as long as the machine runs; those of a recorded one may be another's by now.
fn take_pipes_out_of_the_way(recorded: &mut Recorded) {
    for description in recorded.descriptions.values_mut() {
        let was = description.common.inode();
        let is_unnamed = matches!(&description.state, State::Pipe(pipe) if pipe.fifo.is_none());
        if !is_unnamed {
            continue;
        }
        let is = (was.0, was.1 | NO_PIPE);
        description.common.ino = is.1;
        if let Some(mut pipe) = recorded.pipes.remove(&was) {
            pipe.inode = is;
            recorded.pipes.insert(is, pipe);
        }
    }
}
