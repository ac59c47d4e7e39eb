//! Files without a name, and shared memory: made of their contents in the image.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::ffi::{CString, OsStr};
use std::fs::{File, Permissions};
use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use nix::fcntl::OFlag;
use nix::sys::memfd::{MemFdCreateFlag, memfd_create};
use rustix::fs::{AtFlags, Mode, OFlags, openat, unlinkat};

use crate::image::{NamelessFile, Opened};
use crate::kernel::sysv_segment::{self, Segment};
use crate::kernel::{confined, credentials, shared_map};
use crate::memory::{PAGE, Span};
use crate::objects::{self, Nameless};
use crate::outcome::Refusal;
use crate::record::ObjectId;

use super::origin::Origin;
use super::{Error, Result, system};

/// What was made, by what it stands for.
#[derive(Debug, Default)]
pub(super) struct Contents {
    /// By device and inode as recorded.
    pub(super) files: BTreeMap<(u64, u64), File>,
    /// By open file description.
    pub(super) descriptions: BTreeMap<ObjectId, (u64, u64)>,
    /// Names of files that were open by a name which was deleted.
    pub(super) linked: BTreeMap<(u64, u64), PathBuf>,
    /// Those among them that are shared memory.
    pub(super) shared: Vec<(u64, u64)>,
}

/// Bytes written at once.
const PIECE: u64 = 1 << 20;

impl Contents {
    /// Makes all of them, for a container with this root directory and IPC namespace.
    pub(super) fn make(origin: &Origin, root: &File, namespace: &File) -> Result<Self> {
        let mut made = Self::default();
        let recorded = objects::records::read(origin.context())?;
        let memfds: BTreeMap<(u64, u64), &str> = recorded.memfd_names().collect();
        let segments = origin.image.segments.own().unwrap_or_default();
        for (id, object, mapped) in origin.image.shared()? {
            if mapped.starts_with("/SYSV") {
                let is_it = |segment: &&Segment| segment.id as u64 == object.inode;
                if let Some(segment) = segments.iter().find(is_it) {
                    make_segment(origin, id, *segment, namespace)?;
                }
                continue;
            }
            let name = memfds.get(&(object.device, object.inode));
            let name = name.map_or(mapped.as_str(), |name| name);
            let file = shared(name, object.size, root)?;
            fill(&origin.image, id, object.size, &file)?;
            let key = (object.device, object.inode);
            made.shared.push(key);
            made.files.insert(key, file);
        }
        for (id, nameless) in &origin.image.nameless {
            let key = (nameless.device, nameless.inode);
            if let Entry::Vacant(place) = made.files.entry(key) {
                place.insert(again(origin, *id, nameless, root)?);
            }
            for description in &nameless.descriptions {
                made.descriptions.insert(*description, key);
            }
        }
        for inode in recorded.deleted_inodes() {
            let mut areas = origin.image.files.iter();
            let found = areas.find_map(|(_, area)| area.path_of(inode));
            made.linked.extend(found.map(|path| (inode, path)));
        }
        Ok(made)
    }

    /// The files for descriptions that had none with a name.
    pub(super) fn nameless(&self) -> Nameless<'_> {
        Nameless {
            files: &self.files,
            descriptions: &self.descriptions,
            linked: &self.linked,
        }
    }

    /// The numbers of ours that lead to shared memory.
    pub(super) fn shared(&self) -> impl Iterator<Item = RawFd> {
        let files = self.shared.iter().filter_map(|key| self.files.get(key));
        files.map(|file| file.as_raw_fd())
    }
}

/// System V shared memory, with its content.
fn make_segment(origin: &Origin, id: ObjectId, segment: Segment, namespace: &File) -> Result<()> {
    let mut fill = |bytes: &mut [u8]| {
        let mut pages = vec![0; bytes.len().next_multiple_of(PAGE as usize)];
        let span = Span {
            start: 0,
            end: pages.len() as u64,
        };
        let read = origin.image.read(id, &[span], &mut pages);
        read.map_err(|error| std::io::Error::new(std::io::ErrorKind::InvalidData, error))?;
        bytes.copy_from_slice(&pages[..bytes.len()]);
        Ok(())
    };
    let made = sysv_segment::make(namespace.as_fd(), segment, &mut fill);
    let what = format!("make System V shared memory segment {}", segment.id);
    Ok(made.map_err(system(&what))?)
}

/// A deleted file, with its content and metadata.
fn again(origin: &Origin, id: ObjectId, nameless: &NamelessFile, root: &File) -> Result<File> {
    let owner = (nameless.uid, nameless.gid);
    let file = credentials::acting_as(owner, || without_name(&nameless.path, root))?;
    fill(&origin.image, id, nameless.size, &file)?;
    let describe = |what: &str| system(&format!("{what} {}", nameless.path.display()));
    std::os::unix::fs::fchown(&file, Some(nameless.uid), Some(nameless.gid))
        .map_err(describe("give an owner to"))?;
    file.set_permissions(Permissions::from_mode(nameless.mode & 0o7777))
        .map_err(describe("set the mode of"))?;
    let modified = Duration::from_nanos(nameless.modified_ns.max(0) as u64);
    file.set_modified(SystemTime::UNIX_EPOCH + modified)
        .map_err(describe("set the time of"))?;
    Ok(file)
}

/// Shared memory of this name and size, empty.
fn shared(name: &str, size: u64, root: &File) -> Result<File> {
    let failed = |what: &str| system(&format!("{what} the shared memory {name}"));
    let path = name.strip_suffix(" (deleted)");
    let file = match path {
        Some("/dev/zero") => {
            let len = size.next_multiple_of(PAGE) as usize;
            return shared_map::anonymous(len).map_err(|error| failed("make")(error).into());
        }
        Some(memfd) if memfd.starts_with("/memfd:") => {
            let name = &memfd["/memfd:".len()..];
            let name = CString::new(name).unwrap_or_default();
            let made = memfd_create(
                &name,
                MemFdCreateFlag::MFD_CLOEXEC | MemFdCreateFlag::MFD_ALLOW_SEALING,
            );
            made.map_err(|errno| failed("make")(errno.into()))?.into()
        }
        Some(path) => without_name(Path::new(path), root)?,
        None => {
            let path = Path::new(name);
            let opened = confined::open(root.as_fd(), path, OFlag::O_RDWR | OFlag::O_NOFOLLOW);
            match opened {
                Ok(opened) => File::from(opened),
                Err(errno) => {
                    return Err(Refusal {
                        object: format!("shared memory {name}"),
                        holder: "the container".into(),
                        remedy: format!(
                            "its file is not there: {errno}; put it there, then try again"
                        ),
                    }
                    .into());
                }
            }
        }
    };
    file.set_len(size).map_err(failed("size"))?;
    Ok(file)
}

/// A file without a name, on the file system where it had one.
fn without_name(path: &Path, root: &File) -> Result<File> {
    let failed = |error: std::io::Error| -> Error {
        system(&format!("make the deleted file {}", path.display()))(error).into()
    };
    let mut directory = path
        .parent()
        .map_or_else(|| PathBuf::from("/"), Path::to_owned);
    loop {
        match confined::open_directory(root.as_fd(), &directory) {
            Ok(opened) => {
                let opened = File::from(opened);
                let is_there = path.parent() == Some(&directory);
                let name = path.file_name().filter(|_| is_there);
                return unnamed_in(&opened, name).map_err(failed);
            }
            // Its directory may have been deleted too.
            Err(nix::errno::Errno::ENOENT) if directory.pop() => {}
            Err(errno) => return Err(failed(errno.into())),
        }
    }
}

/// A file without a name in a directory: one that had `name`, as the kernel goes on to show it, if that is free.
fn unnamed_in(directory: &File, name: Option<&OsStr>) -> std::io::Result<File> {
    let flags = OFlags::RDWR | OFlags::CLOEXEC;
    let mode = Mode::RUSR | Mode::WUSR;
    if let Some(name) = name
        && let Ok(file) = openat(directory, name, flags | OFlags::CREATE | OFlags::EXCL, mode)
    {
        unlinkat(directory, name, AtFlags::empty())?;
        return Ok(file.into());
    }
    Ok(openat(directory, c".", flags | OFlags::TMPFILE, mode)?.into())
}

/// Writes the content of an object of the image.
fn fill(image: &Opened, id: ObjectId, size: u64, file: &File) -> Result<()> {
    file.set_len(size)
        .map_err(|error| system("size a file")(error))?;
    let mut buffer = vec![0; PIECE as usize];
    for run in image.runs(id) {
        let (mut at, end) = (run.address, run.address + u64::from(run.pages) * PAGE);
        while at < end {
            let span = Span {
                start: at,
                end: end.min(at + PIECE),
            };
            let bytes = &mut buffer[..span.len() as usize];
            image.read(id, &[span], bytes)?;
            let len = bytes.len().min(size.saturating_sub(at) as usize);
            file.write_all_at(&bytes[..len], at)
                .map_err(|error| system("write a file")(error))?;
            at = span.end;
        }
    }
    Ok(())
}
