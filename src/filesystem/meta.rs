//! What is known of an inode besides content and names.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use rustix::fs::{AtFlags, Mode, OFlags, Statx, StatxFlags};

/// Seconds and nanoseconds since 1970.
pub type Time = (i64, u32);

/// Attributes of an inode (`STATX_ATTR_*`) that keep it from being changed.
pub const IMMUTABLE: u64 = 0x10;
/// As [`IMMUTABLE`]: may only be appended to.
pub const APPEND: u64 = 0x20;
/// Attributes that are looked at.
const ATTRIBUTES: u64 = IMMUTABLE | APPEND;

/// What statx(2) tells of an inode.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Stat {
    /// Inode number; of what is in the upper layer of an overlay the one it has there, as that which the mount shows is not
    /// always the same for all names of a file.
    pub ino: u64,
    /// The device of it.
    pub device: u64,
    /// Device and inode number as the mount shows them.
    pub shown: (u64, u64),
    /// Type and permissions.
    pub mode: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Device number of a device, as `makedev` has it.
    pub rdev: u64,
    /// Names it has.
    pub links: u32,
    /// Size in bytes.
    pub size: u64,
    /// Last access.
    pub atime: Time,
    /// Last change of content.
    pub mtime: Time,
    /// Last change of anything; nobody can set it.
    pub ctime: Time,
    /// When it was made; zero if the file system does not tell.
    pub born: Time,
    /// [`IMMUTABLE`], [`APPEND`].
    pub attributes: u64,
}

/// What names an inode: numbers are used again, but not by one that was made at the same time.
pub type Identity = (u64, Time);

impl Stat {
    /// What names it.
    pub fn identity(&self) -> Identity {
        (self.ino, self.born)
    }

    /// `S_IF*`.
    pub fn file_type(&self) -> u32 {
        self.mode & libc::S_IFMT
    }

    /// A regular file.
    pub fn is_file(&self) -> bool {
        self.file_type() == libc::S_IFREG
    }

    /// A directory.
    pub fn is_directory(&self) -> bool {
        self.file_type() == libc::S_IFDIR
    }

    /// A symbolic link.
    pub fn is_symlink(&self) -> bool {
        self.file_type() == libc::S_IFLNK
    }

    /// This, of the inode that is another's.
    pub fn named_as(&self, other: &Self) -> Self {
        Self {
            ino: other.ino,
            device: other.device,
            shown: other.shown,
            born: other.born,
            ..self.clone()
        }
    }

    /// What the mount shows, with what names an inode in the upper layer.
    pub fn in_upper(self, upper: &Self) -> Self {
        Self {
            ino: upper.ino,
            device: upper.device,
            born: upper.born,
            links: upper.links,
            ..self
        }
    }

    fn new(from: &Statx) -> Self {
        let device =
            nix::sys::stat::makedev(u64::from(from.stx_dev_major), u64::from(from.stx_dev_minor));
        Self {
            ino: from.stx_ino,
            device,
            shown: (device, from.stx_ino),
            mode: u32::from(from.stx_mode),
            uid: from.stx_uid,
            gid: from.stx_gid,
            rdev: nix::sys::stat::makedev(
                u64::from(from.stx_rdev_major),
                u64::from(from.stx_rdev_minor),
            ),
            links: from.stx_nlink,
            size: from.stx_size,
            atime: (from.stx_atime.tv_sec, from.stx_atime.tv_nsec),
            mtime: (from.stx_mtime.tv_sec, from.stx_mtime.tv_nsec),
            ctime: (from.stx_ctime.tv_sec, from.stx_ctime.tv_nsec),
            born: (from.stx_btime.tv_sec, from.stx_btime.tv_nsec),
            attributes: from.stx_attributes.bits() & ATTRIBUTES,
        }
    }
}

/// Looks at a name in a directory; at the directory itself if the name is empty. Links are not followed.
pub fn stat(directory: BorrowedFd<'_>, name: &OsStr) -> io::Result<Stat> {
    let flags = AtFlags::SYMLINK_NOFOLLOW | AtFlags::EMPTY_PATH | AtFlags::NO_AUTOMOUNT;
    let found = rustix::fs::statx(
        directory,
        name,
        flags,
        StatxFlags::BASIC_STATS | StatxFlags::BTIME,
    )?;
    Ok(Stat::new(&found))
}

/// All that is recorded of an inode.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Meta {
    /// What statx(2) tells.
    pub stat: Stat,
    /// Where a symbolic link leads.
    pub target: Vec<u8>,
    /// Extended attributes, access control lists and file capabilities among them.
    pub xattrs: BTreeMap<Vec<u8>, Vec<u8>>,
}

impl Meta {
    /// What is at a name in a directory whose [`stat()`] is known.
    pub fn read(directory: BorrowedFd<'_>, name: &OsStr, stat: Stat) -> io::Result<Self> {
        let target = if stat.is_symlink() {
            rustix::fs::readlinkat(directory, name, Vec::new())?.into_bytes()
        } else {
            Vec::new()
        };
        Ok(Self {
            xattrs: xattrs(&path_of(directory, name), name.is_empty())?,
            target,
            stat,
        })
    }

    /// Whether one inode can become the other: what can't be changed of an inode is the same.
    pub fn is_same_sort(&self, other: &Self) -> bool {
        self.stat.file_type() == other.stat.file_type()
            && self.stat.rdev == other.stat.rdev
            && self.target == other.target
    }

    /// Whether owner, permissions and extended attributes are the same.
    pub fn has_same_rights(&self, other: &Self) -> bool {
        let rights = |meta: &Self| (meta.stat.mode, meta.stat.uid, meta.stat.gid);
        rights(self) == rights(other) && self.xattrs == other.xattrs
    }
}

/// A path that leads to a name in a directory that is held open; to what is held if the name is empty, and then the path is a
/// link that has to be followed.
pub fn path_of(directory: BorrowedFd<'_>, name: &OsStr) -> PathBuf {
    let directory = PathBuf::from(format!("/proc/self/fd/{}", directory.as_raw_fd()));
    match name.is_empty() {
        true => directory,
        false => directory.join(name),
    }
}

/// `follow`: of what a link leads to.
fn xattrs(path: &std::path::Path, follow: bool) -> io::Result<BTreeMap<Vec<u8>, Vec<u8>>> {
    let mut list = Vec::new();
    let listed = grown(&mut list, |buffer| match follow {
        true => rustix::fs::listxattr(path, buffer),
        false => rustix::fs::llistxattr(path, buffer),
    });
    match listed {
        Ok(()) => {}
        Err(rustix::io::Errno::OPNOTSUPP) => return Ok(BTreeMap::new()),
        Err(errno) => return Err(errno.into()),
    }
    let names = list
        .split(|&byte| byte == 0)
        .filter(|name| !name.is_empty());
    let mut found = BTreeMap::new();
    for name in names {
        let mut value = Vec::new();
        let key = OsStr::from_bytes(name);
        let read = grown(&mut value, |buffer| match follow {
            true => rustix::fs::getxattr(path, key, buffer),
            false => rustix::fs::lgetxattr(path, key, buffer),
        });
        match read {
            Ok(()) => {
                found.insert(name.to_vec(), value);
            }
            // Some are listed and can't be read: those of POSIX lists that say no more than the mode.
            Err(rustix::io::Errno::NODATA | rustix::io::Errno::OPNOTSUPP) => {}
            Err(errno) => return Err(errno.into()),
        }
    }
    Ok(found)
}

/// Repeats a call with more room until its answer fits.
fn grown(
    buffer: &mut Vec<u8>,
    mut call: impl FnMut(&mut [u8]) -> rustix::io::Result<usize>,
) -> rustix::io::Result<()> {
    let mut room = 256;
    loop {
        buffer.resize(room, 0);
        match call(buffer) {
            Ok(len) => {
                buffer.truncate(len);
                return Ok(());
            }
            Err(rustix::io::Errno::RANGE) if room < 1 << 20 => room *= 4,
            Err(errno) => return Err(errno),
        }
    }
}

/// Opens a directory below another, by its name.
pub fn open_directory(directory: BorrowedFd<'_>, name: &OsStr) -> io::Result<OwnedFd> {
    let flags =
        OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::NOATIME | OFlags::CLOEXEC;
    Ok(rustix::fs::openat(directory, name, flags, Mode::empty())?)
}

/// What a directory says of a name in it.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Entry {
    /// The name.
    pub name: std::ffi::OsString,
    /// The number of the inode.
    pub number: u64,
}

/// What is in a directory, sorted by name.
pub fn entries(directory: BorrowedFd<'_>) -> io::Result<Vec<Entry>> {
    // A descriptor of its own: the position is not shared.
    let own = open_directory(directory, OsStr::new("."))?;
    let mut entries = Vec::new();
    for entry in rustix::fs::Dir::read_from(own.as_fd())? {
        let entry = entry?;
        let name = entry.file_name().to_bytes();
        if name != b"." && name != b".." {
            entries.push(Entry {
                name: OsStr::from_bytes(name).to_owned(),
                number: entry.ino(),
            });
        }
    }
    entries.sort_unstable();
    Ok(entries)
}

/// The names in a directory, sorted.
pub fn names(directory: BorrowedFd<'_>) -> io::Result<Vec<std::ffi::OsString>> {
    let entries = entries(directory)?.into_iter();
    Ok(entries.map(|entry| entry.name).collect())
}
