//! Carries a plan out, through the tree's own mount.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use rustix::fs::{
    AtFlags, Dev, FileType, Gid, Mode, OFlags, RenameFlags, Timespec, Timestamps, Uid, XattrFlags,
};

use super::Result;
use super::content::{Source, fill, put_back};
use super::meta::{Meta, path_of};
use super::mounted::{Mounted, descend, open_file, split};
use super::plan::{Op, Plan};
use super::tree::{Content, Node, NodeId, Tree};

/// What was put back.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Put {
    /// Names that were made, moved or removed, and inodes that were changed.
    pub changes: u64,
    /// Bytes of content written.
    pub bytes: u64,
}

impl Put {
    /// Adds up.
    pub fn add(&mut self, other: Self) {
        self.changes += other.changes;
        self.bytes += other.bytes;
    }
}

/// Makes the changes. An error leaves the area neither as it was nor as recorded.
pub fn execute(mounted: &Mounted, wanted: &Tree, plan: &Plan) -> Result<Put> {
    let mut executor = Executor {
        mounted,
        wanted,
        stash: None,
        last: None,
        put: Put::default(),
    };
    for op in &plan.ops {
        let (what, path) = describe(op);
        executor.run(op).map_err(mounted.error(what, path))?;
        executor.put.changes += 1;
    }
    executor
        .finish()
        .map_err(mounted.error("remove the stash in", Path::new("")))?;
    Ok(executor.put)
}

fn describe(op: &Op) -> (&'static str, &Path) {
    match op {
        Op::Stash(path, _) => ("move away", path),
        Op::Unlink(path) | Op::RemoveDirectory(path) => ("remove", path),
        Op::Make(path, _) => ("make", path),
        Op::Unstash(_, path) => ("move back", path),
        Op::Link { to, .. } => ("link", to),
        Op::Rewrite(path, _) => ("rewrite", path),
        Op::Rights(path, _) => ("set owner and permissions of", path),
        Op::Times(path, _) => ("set times of", path),
    }
}

struct Executor<'a> {
    mounted: &'a Mounted,
    wanted: &'a Tree,
    /// Directory in the root of what is moved: its name, and itself.
    stash: Option<(String, OwnedFd)>,
    /// The directory that was opened last.
    last: Option<(PathBuf, OwnedFd)>,
    put: Put,
}

impl Executor<'_> {
    fn run(&mut self, op: &Op) -> io::Result<()> {
        match op {
            Op::Stash(path, node) => {
                let stash = self.stash()?;
                let (directory, name) = self.at(path)?;
                // Also the paths of directories opened before change with it.
                rustix::fs::renameat(directory, name, stash, node.to_string())?;
                self.last = None;
            }
            Op::Unlink(path) => {
                let (directory, name) = self.at(path)?;
                rustix::fs::unlinkat(directory, name, AtFlags::empty())?;
            }
            Op::RemoveDirectory(path) => {
                let (directory, name) = self.at(path)?;
                rustix::fs::unlinkat(directory, name, AtFlags::REMOVEDIR)?;
                self.last = None;
            }
            Op::Make(path, node) => self.make(path, *node)?,
            Op::Unstash(node, path) => {
                let stash = self.stash()?;
                let (directory, name) = self.at(path)?;
                let flags = RenameFlags::NOREPLACE;
                rustix::fs::renameat_with(stash, node.to_string(), directory, name, flags)?;
            }
            Op::Link { from, to } => {
                let (of, old) = split(from);
                let of = descend(self.mounted.root.as_fd(), of)?;
                let (directory, name) = self.at(to)?;
                rustix::fs::linkat(of, old, directory, name, AtFlags::empty())?;
            }
            Op::Rewrite(path, node) => {
                let (mounted, wanted) = (self.mounted, self.wanted);
                let content = Wanted::open(mounted, &wanted.nodes[*node])?;
                let (directory, name) = self.at(path)?;
                let live = open_file(directory.as_fd(), name, OFlags::RDWR)?;
                self.put.bytes += put_back(&live, content.source())?;
            }
            Op::Rights(path, node) => {
                let meta = &self.wanted.nodes[*node].meta;
                let (directory, name) = self.at(path)?;
                set_rights(directory.as_fd(), name, meta)?;
            }
            Op::Times(path, node) => {
                let meta = &self.wanted.nodes[*node].meta;
                let (directory, name) = self.at(path)?;
                set_times(directory.as_fd(), name, meta)?;
            }
        }
        Ok(())
    }

    /// The directory of a path, and its last name, which is `.` for the root.
    fn at<'p>(&mut self, path: &'p Path) -> io::Result<(OwnedFd, &'p OsStr)> {
        let (parent, name) = split(path);
        let name = if name.is_empty() {
            OsStr::new(".")
        } else {
            name
        };
        if let Some((last, directory)) = &self.last
            && last == parent
        {
            return Ok((directory.try_clone()?, name));
        }
        let directory = descend(self.mounted.root.as_fd(), parent)?;
        self.last = Some((parent.to_owned(), directory.try_clone()?));
        Ok((directory, name))
    }

    fn stash(&mut self) -> io::Result<OwnedFd> {
        if self.stash.is_none() {
            let root = self.mounted.root.as_fd();
            let mut number = 0;
            let name = loop {
                let name = format!(".snapback-stash-{number}");
                match rustix::fs::mkdirat(root, &name, Mode::RWXU) {
                    Ok(()) => break name,
                    Err(rustix::io::Errno::EXIST) => number += 1,
                    Err(errno) => return Err(errno.into()),
                }
            };
            let directory = descend(root, Path::new(&name))?;
            self.stash = Some((name, directory));
        }
        match &self.stash {
            Some((_, directory)) => Ok(directory.try_clone()?),
            None => Err(io::ErrorKind::NotFound.into()),
        }
    }

    fn finish(&mut self) -> io::Result<()> {
        if let Some((name, _)) = self.stash.take() {
            let root = self.mounted.root.as_fd();
            rustix::fs::unlinkat(root, name, AtFlags::REMOVEDIR)?;
            set_times(
                root,
                OsStr::new("."),
                &self.wanted.nodes[super::tree::ROOT].meta,
            )?;
        }
        Ok(())
    }

    fn make(&mut self, path: &Path, node: NodeId) -> io::Result<()> {
        let (directory, name) = self.at(path)?;
        let wanted = &self.wanted.nodes[node];
        let stat = &wanted.meta.stat;
        match stat.file_type() {
            libc::S_IFDIR => rustix::fs::mkdirat(&directory, name, Mode::RWXU)?,
            libc::S_IFREG => {
                let flags = OFlags::CREATE | OFlags::EXCL | OFlags::RDWR | OFlags::CLOEXEC;
                let mode = Mode::RUSR | Mode::WUSR;
                let file = File::from(rustix::fs::openat(&directory, name, flags, mode)?);
                self.put.bytes += fill(&file, Wanted::open(self.mounted, wanted)?.source())?;
            }
            libc::S_IFLNK => {
                use std::os::unix::ffi::OsStrExt;
                let target = OsStr::from_bytes(&wanted.meta.target);
                rustix::fs::symlinkat(target, &directory, name)?;
            }
            kind => {
                let mode = Mode::RUSR | Mode::WUSR;
                let kind = FileType::from_raw_mode(kind);
                rustix::fs::mknodat(&directory, name, kind, mode, stat.rdev as Dev)?;
            }
        }
        set_rights(directory.as_fd(), name, &wanted.meta)
    }
}

/// Where the wanted content of a node is, opened.
pub enum Wanted<'a> {
    /// In the store.
    Kept(&'a super::store::Kept),
    /// In the lower layers.
    File(File, u64),
}

impl<'a> Wanted<'a> {
    /// Opens it.
    pub fn open(mounted: &Mounted, node: &'a Node) -> io::Result<Self> {
        match &node.content {
            Content::Kept(kept) => Ok(Self::Kept(kept)),
            Content::Lower(path) => {
                let lower = mounted.lower.as_ref().ok_or(io::ErrorKind::NotFound)?;
                let (parent, name) = split(path);
                let directory = descend(lower.as_fd(), parent)?;
                let file = open_file(directory.as_fd(), name, OFlags::RDONLY)?;
                let size = file.metadata()?.len();
                Ok(Self::File(file, size))
            }
            Content::Unknown => Err(io::Error::other("its content was not kept")),
        }
    }

    /// To read from.
    pub fn source(&self) -> Source<'_> {
        match self {
            Self::Kept(kept) => Source::Kept(kept),
            Self::File(file, size) => Source::File(file, *size),
        }
    }
}

/// Owner, extended attributes and permissions, in the order in which they do not undo each other; of the descriptor itself if
/// the name is empty.
pub fn set_rights(directory: BorrowedFd<'_>, name: &OsStr, meta: &Meta) -> io::Result<()> {
    rustix::fs::chownat(
        directory,
        name,
        Some(Uid::from_raw(meta.stat.uid)),
        Some(Gid::from_raw(meta.stat.gid)),
        itself_or_name(name),
    )?;
    let found = super::meta::stat(directory, name)?;
    let now = Meta::read(directory, name, found)?;
    let path = path_of(directory, name);
    set_attributes(&path, name.is_empty(), &meta.xattrs, &now.xattrs)?;
    if !meta.stat.is_symlink() {
        let mode = Mode::from_raw_mode(meta.stat.mode & 0o7777);
        rustix::fs::chmod(&path, mode)?;
    }
    Ok(())
}

fn set_attributes(
    path: &Path,
    follow: bool,
    wanted: &BTreeMap<Vec<u8>, Vec<u8>>,
    now: &BTreeMap<Vec<u8>, Vec<u8>>,
) -> io::Result<()> {
    use std::os::unix::ffi::OsStrExt;
    for name in now.keys().filter(|name| !wanted.contains_key(*name)) {
        let name = OsStr::from_bytes(name);
        match follow {
            true => rustix::fs::removexattr(path, name)?,
            false => rustix::fs::lremovexattr(path, name)?,
        }
    }
    for (name, value) in wanted {
        if now.get(name) != Some(value) {
            let (name, flags) = (OsStr::from_bytes(name), XattrFlags::empty());
            match follow {
                true => rustix::fs::setxattr(path, name, value, flags)?,
                false => rustix::fs::lsetxattr(path, name, value, flags)?,
            }
        }
    }
    Ok(())
}

/// Times of last access and change of content; of the descriptor itself if the name is empty.
pub fn set_times(directory: BorrowedFd<'_>, name: &OsStr, meta: &Meta) -> io::Result<()> {
    let time = |(seconds, nanoseconds): (i64, u32)| Timespec {
        tv_sec: seconds,
        tv_nsec: i64::from(nanoseconds),
    };
    let times = Timestamps {
        last_access: time(meta.stat.atime),
        last_modification: time(meta.stat.mtime),
    };
    Ok(rustix::fs::utimensat(
        directory,
        name,
        &times,
        itself_or_name(name),
    )?)
}

fn itself_or_name(name: &OsStr) -> AtFlags {
    match name.is_empty() {
        true => AtFlags::EMPTY_PATH,
        false => AtFlags::SYMLINK_NOFOLLOW,
    }
}
