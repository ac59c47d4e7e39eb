//! An address space as it was, to be read on another thread than the one that traces.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;
use std::sync::Arc;

use crate::freeze;
use crate::kernel::maps::Vma;
use crate::kernel::pidfd;
use crate::kernel::procfs::{self, Bounds};
use crate::record::{Context, ObjectId};

use super::Result;
use super::image::SpaceImage;
use super::layout::Layout;
use super::lent::LenderHeader;
use super::ranges::{Ranges, Span};
use super::source::Source;
use super::space::system;

/// What an image has of an address space, apart from the image. It can be read as long as the shadow lives, or if what that had
/// was kept; otherwise everything is an error, also if another process has got its PID.
#[derive(Debug)]
pub struct SpaceContent {
    /// The object id of its records.
    pub id: ObjectId,
    /// The VMA list.
    pub layout: Layout,
    source: Arc<Source>,
    /// Of the shadow, by which it is told that it was that which was read.
    pidfd: Option<OwnedFd>,
    populated: Ranges,
    pins: BTreeMap<(u64, u64), Arc<File>>,
}

impl SpaceContent {
    /// Takes it from an image.
    ///
    /// # Errors
    ///
    /// The shadow is dead.
    pub fn of(image: &SpaceImage, context: &Context) -> Result<Self> {
        let failed = |what: &str, error: io::Error| system(image.pid, what, error);
        let pidfd = match image.source.shadow() {
            None => None,
            Some(_) if image.source.is_kept() => None,
            Some(shadow) if shadow.is_alive() => Some(
                pidfd::open(shadow.pid).map_err(|errno| failed("hold a shadow", errno.into()))?,
            ),
            Some(_) => return Err(freeze::Error::Gone(image.pid).into()),
        };
        Ok(Self {
            id: image.id,
            layout: image.layout.clone(),
            source: Arc::clone(&image.source),
            pidfd,
            populated: image.populated(context)?,
            pins: image.pins.clone(),
        })
    }

    /// Its pages but for its guards. Where it has none it was empty, or showed a file.
    ///
    /// # Errors
    ///
    /// The shadow has died.
    pub fn ranges(&self) -> Result<Ranges> {
        Ok(self.populated.difference(&self.guards()?))
    }

    /// The shadow, and which of these pages are in it; of the others copies are kept.
    ///
    /// # Errors
    ///
    /// The shadow has died.
    pub fn lender(&self) -> Result<Option<(LenderHeader, Ranges)>> {
        let Some(shadow) = self.source.shadow().filter(|_| !self.source.is_kept()) else {
            return Ok(None);
        };
        let stat = || {
            procfs::Stat::read(shadow.pid)
                .map_err(|error| system(shadow.pid, "read the stat of a shadow", error))
        };
        let header = LenderHeader {
            pid: shadow.pid.as_raw() as u64,
            start_time: self.checked(stat)?.start_time(),
        };
        let ranges = self.ranges()?.difference(&self.source.copies());
        Ok(Some((header, ranges)))
    }

    /// Reads ranges of pages, one after the other, into `buffer`.
    ///
    /// # Errors
    ///
    /// The shadow has died.
    pub fn read(&self, spans: &[Span], buffer: &mut [u8]) -> io::Result<()> {
        self.source.read(spans, buffer)?;
        match self.check() {
            // It may have been the shadow that answered while that was being let go.
            Err(_) if self.source.is_kept() => self.source.read(spans, buffer),
            checked => checked,
        }
    }

    /// Fails if it was not the shadow that answered.
    fn check(&self) -> io::Result<()> {
        match &self.pidfd {
            Some(pidfd) => Ok(pidfd::send_signal(pidfd.as_fd(), 0)?),
            None => Ok(()),
        }
    }

    fn checked<T>(&self, read: impl Fn() -> Result<T>) -> Result<T> {
        let found = read();
        match self.check() {
            Err(_) if self.source.is_kept() => read(),
            Err(error) if found.is_ok() => Err(system(self.pid(), "read a shadow", error)),
            _ => found,
        }
    }

    fn pid(&self) -> nix::unistd::Pid {
        let shadow = self.source.shadow();
        shadow.map_or(nix::unistd::Pid::this(), |shadow| shadow.pid)
    }

    /// See [`Source::smaps`].
    ///
    /// # Errors
    ///
    /// The shadow has died; so for all that follow.
    pub fn smaps(&self) -> Result<String> {
        self.checked(|| self.source.smaps())
    }

    /// See [`Source::policies`].
    ///
    /// # Errors
    ///
    /// As above.
    pub fn policies(&self) -> Result<Option<String>> {
        self.checked(|| self.source.policies())
    }

    /// See [`Source::guards`].
    ///
    /// # Errors
    ///
    /// As above.
    pub fn guards(&self) -> Result<Ranges> {
        self.checked(|| self.source.guards(&self.layout))
    }

    /// See [`Source::bounds`].
    ///
    /// # Errors
    ///
    /// As above.
    pub fn bounds(&self) -> Result<Bounds> {
        self.checked(|| self.source.bounds())
    }

    /// See [`Source::auxv`].
    ///
    /// # Errors
    ///
    /// As above.
    pub fn auxv(&self) -> Result<Vec<u8>> {
        self.checked(|| self.source.auxv())
    }

    /// The program's file, and its path as the link in `/proc` tells it.
    ///
    /// # Errors
    ///
    /// As above.
    pub fn program(&self) -> Result<(PathBuf, File)> {
        self.checked(|| self.source.program())
            .map(|(file, path)| (path, file))
    }

    /// The VMAs by which the files that it shows can be opened: one for each file.
    ///
    /// # Errors
    ///
    /// As above.
    pub fn mapped(&self) -> Result<Vec<Vma>> {
        let there = self.checked(|| self.source.mapped())?.vmas;
        let mut found = BTreeMap::new();
        let files = there.into_iter().chain(self.layout.vmas.iter().cloned());
        for vma in files.filter(|vma| !vma.is_anonymous() && !vma.is_special()) {
            if self.layout.vmas.iter().any(|of| inode(of) == inode(&vma)) {
                found.entry(inode(&vma)).or_insert(vma);
            }
        }
        Ok(found.into_values().collect())
    }

    /// Opens the file behind one of these: an `O_PATH` descriptor.
    ///
    /// # Errors
    ///
    /// The shadow has died.
    pub fn pin_mapped(&self, vma: &Vma) -> io::Result<File> {
        if let Some(pin) = self.pins.get(&inode(vma)) {
            return pin.try_clone();
        }
        let pinned = self.source.pin_mapped(vma);
        match self.check() {
            Err(_) if self.source.is_kept() => self.source.pin_mapped(vma),
            Err(error) if pinned.is_ok() => Err(error),
            _ => pinned,
        }
    }
}

fn inode(vma: &Vma) -> (u64, u64) {
    (vma.device, vma.inode)
}
