//! Where an address space is kept as it was: in a shadow and in copies of pages, or in an image on disk.

use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::os::fd::AsRawFd;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};

use nix::unistd::Pid;

use crate::fault;
use crate::kernel::maps::{self, Vma};
use crate::kernel::pagemap::Scan;
use crate::kernel::procfs::{self, Bounds};
use crate::kernel::smaps;

use super::kept;
use super::layout::Layout;
use super::page_map::PageMap;
use super::ranges::{Ranges, Span};
use super::shadow::Shadow;
use super::space::{refuse, system};
use super::{PAGE, Result};

/// What holds the pages of an image, and what else of the address space no record tells.
#[derive(Debug)]
pub enum Source {
    /// In RAM.
    Resident(Resident),
    /// An image that was persisted.
    Stored(Stored),
}

/// An address space in RAM: a shadow, and pages that are not in it as they were. Of a full image those are what fork does not
/// copy, of an increment also all that was written since the shadow was made.
#[derive(Debug)]
pub struct Resident {
    pub(super) base: Arc<Base>,
    pub(super) pages: PageMap,
    /// What the shadow has otherwise; `None`: it is of the same state.
    pub(super) described: Option<Described>,
}

/// A shadow, which images may have in common.
#[derive(Debug)]
pub(super) struct Base {
    /// The shadow.
    pub(super) shadow: Shadow,
    /// Names it.
    pub(super) id: u64,
    /// What else than memory it has of the process, as who made it tells: only one that has the same can share it.
    pub(super) standing: Vec<u8>,
    vmas: OnceLock<Vec<Vma>>,
    /// What the shadow had, once it has ended.
    kept: OnceLock<Stored>,
}

/// What an address space was like besides its pages and VMAs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Described {
    /// What was set on its VMAs, but for locks.
    pub(super) flags: Vec<smaps::Flags>,
    pub(super) guards: Ranges,
    pub(super) bounds: Bounds,
    pub(super) auxv: Vec<u8>,
    pub(super) policies: Option<String>,
}

impl Base {
    pub(super) fn new(shadow: Shadow, standing: Vec<u8>) -> Self {
        static LAST: AtomicU64 = AtomicU64::new(0);
        Self {
            shadow,
            id: LAST.fetch_add(1, Ordering::Relaxed) + 1,
            standing,
            vmas: OnceLock::new(),
            kept: OnceLock::new(),
        }
    }

    /// Its VMAs, which never change.
    pub(super) fn vmas(&self) -> Result<&[Vma]> {
        if let Some(vmas) = self.vmas.get() {
            return Ok(vmas);
        }
        let pid = self.shadow.pid;
        let text = std::fs::read(procfs::path(pid, "maps"))
            .map_err(|error| system(pid, "read the map of a shadow", error))?;
        let vmas = maps::parse(&text).unwrap_or_default();
        Ok(self.vmas.get_or_init(|| vmas))
    }

    /// Copies out what the shadow has, if it is about to end, and lets it.
    pub(super) fn outlive(&self) -> Result<()> {
        if !self.shadow.is_ending() {
            return Ok(());
        }
        let kept = kept::keep(self).map(|kept| self.kept.get_or_init(|| kept));
        // Those who read of it on other threads look for what was kept if they find that it has gone.
        self.shadow.let_go();
        kept?;
        fault::point("ended.kept");
        Ok(())
    }

    /// What the shadow had, if it has ended and that was kept.
    pub(super) fn kept(&self) -> Option<&Stored> {
        self.kept.get()
    }

    fn read(&self, spans: &[Span], buffer: &mut [u8]) -> std::io::Result<()> {
        match self.kept() {
            Some(kept) => read_spans(&*kept.pages, spans, buffer),
            None => self.shadow.read(spans, buffer),
        }
    }
}

impl Resident {
    /// Reads pages: those that are not kept by copy from the shadow, all in one go.
    fn read(&self, spans: &[Span], buffer: &mut [u8]) -> std::io::Result<()> {
        let mut of_shadow: Vec<(usize, Span)> = Vec::new();
        let mut at = 0;
        for span in spans {
            let mut next = span.start;
            let part = |start, end, of_shadow: &mut Vec<(usize, Span)>| {
                if start < end {
                    of_shadow.push((at + (start - span.start) as usize, Span { start, end }));
                }
            };
            self.pages.each_in(*span, |page, slot| {
                part(next, page, &mut of_shadow);
                let place = at + (page - span.start) as usize;
                let store = self.pages.store();
                store.look(slot, |bytes| {
                    buffer[place..place + bytes.len()].copy_from_slice(bytes);
                });
                next = page + PAGE;
            });
            part(next, span.end, &mut of_shadow);
            at += span.len() as usize;
        }
        let base = &self.base;
        if let [(0, whole)] = of_shadow[..]
            && whole.len() as usize == at
        {
            return base.read(&[whole], &mut buffer[..at]);
        }
        if of_shadow.is_empty() {
            return Ok(());
        }
        let parts: Vec<Span> = of_shadow.iter().map(|(_, span)| *span).collect();
        let mut bytes = vec![0; parts.iter().map(Span::len).sum::<u64>() as usize];
        base.read(&parts, &mut bytes)?;
        let mut rest = &bytes[..];
        for (place, span) in of_shadow {
            let (part, after) = rest.split_at(span.len() as usize);
            buffer[place..place + part.len()].copy_from_slice(part);
            rest = after;
        }
        Ok(())
    }
}

/// An address space as an image on disk has it, or as a shadow had it that has ended.
#[derive(Debug)]
pub struct Stored {
    /// The text of the shadow's `/proc/PID/smaps`.
    pub smaps: String,
    /// Its guards (`MADV_GUARD_INSTALL`).
    pub guards: Ranges,
    /// Where the parts of the program are.
    pub bounds: Bounds,
    /// The auxiliary vector.
    pub auxv: Vec<u8>,
    /// The text of `numa_maps` if it tells of another policy than the default; not known of an image.
    pub policies: Option<String>,
    /// The program, open.
    pub program: File,
    /// Its path.
    pub program_path: PathBuf,
    /// The files behind its mappings, open, by device and inode as recorded.
    pub files: BTreeMap<(u64, u64), File>,
    /// Its pages.
    pub pages: Arc<dyn Pages>,
}

/// Pages as they were.
pub trait Pages: std::fmt::Debug + Send + Sync {
    /// What reads them. Each thread has one of its own.
    fn reader(&self) -> Box<dyn PageReader + '_>;

    /// Bytes of memory that they take.
    fn own_bytes(&self) -> u64 {
        0
    }
}

/// Who is given parts of an address space, in order; what comes without bytes is zero.
pub type Look<'l, E = std::io::Error> =
    dyn FnMut(Span, Option<&[u8]>) -> std::result::Result<(), E> + 'l;

/// Reads pages, best in order.
pub trait PageReader {
    /// Gives `each` the parts of a span as the reader has them, so that nothing is copied on the way.
    ///
    /// # Errors
    ///
    /// They can't be read, or are damaged; or an error of `each`.
    fn look(&mut self, span: Span, each: &mut Look<'_>) -> std::io::Result<()>;
}

/// Who reads what is in RAM.
struct ResidentReader<'r> {
    resident: &'r Resident,
    bytes: Vec<u8>,
}

impl PageReader for ResidentReader<'_> {
    fn look(&mut self, span: Span, each: &mut Look<'_>) -> std::io::Result<()> {
        self.bytes.resize(span.len() as usize, 0);
        self.resident.read(&[span], &mut self.bytes)?;
        each(span, Some(&self.bytes))
    }
}

/// The VMAs of a source by which `/proc/PID/map_files` names them (none if it is no process), and the `VmFlags` of each.
#[derive(Debug)]
pub(super) struct Mapped {
    pub(super) vmas: Vec<Vma>,
    pub(super) flags: Vec<smaps::Flags>,
}

impl Source {
    /// What it is in RAM, if it is.
    pub(super) fn in_ram(&self) -> Option<&Resident> {
        match self {
            Self::Resident(resident) => Some(resident),
            Self::Stored(_) => None,
        }
    }

    /// As [`Source::in_ram`], or a refusal.
    pub(super) fn resident(&self, pid: Pid) -> Result<&Resident> {
        self.in_ram().ok_or_else(|| {
            refuse(
                pid,
                "its memory",
                "it is in an image on disk only; restore that first",
            )
        })
    }

    /// The shadow that has pages of it, if there is one: its own, or that of a checkpoint which came before.
    pub fn shadow(&self) -> Option<&Shadow> {
        self.in_ram().map(|resident| &resident.base.shadow)
    }

    /// Names the shadow among all that there ever were.
    pub fn shadow_id(&self) -> Option<u64> {
        self.in_ram().map(|resident| resident.base.id)
    }

    /// Whether another has the same shadow.
    pub fn shares_shadow(&self, other: &Self) -> bool {
        match (self.in_ram(), other.in_ram()) {
            (Some(one), Some(other)) => Arc::ptr_eq(&one.base, &other.base),
            _ => false,
        }
    }

    /// Pages that are kept by copy.
    pub(super) fn copies(&self) -> Ranges {
        let pages = self.in_ram().map(|resident| resident.pages.pages());
        pages.unwrap_or_default()
    }

    /// What is known of it other than by a living shadow.
    fn stored(&self) -> Option<&Stored> {
        match self {
            Self::Resident(resident) => resident.base.kept(),
            Self::Stored(stored) => Some(stored),
        }
    }

    /// Whether a shadow that it has pages in has ended, and what it had was kept.
    pub fn is_kept(&self) -> bool {
        self.in_ram()
            .is_some_and(|resident| resident.base.kept().is_some())
    }

    /// Bytes of memory that are the shadow's own, or were kept of it; 0 if there is none.
    pub fn own_bytes(&self) -> u64 {
        match self.in_ram().map(|resident| resident.base.kept()) {
            Some(Some(kept)) => kept.pages.own_bytes(),
            Some(None) => procfs::own_bytes(self.pid()).unwrap_or(0),
            None => 0,
        }
    }

    /// Has the shadow stop when it is killed: see [`Source::outlive`].
    ///
    /// # Errors
    ///
    /// It has died.
    pub fn prepare_to_outlive(&self) -> Result<()> {
        self.shadow().map_or(Ok(()), Shadow::stop_at_end)
    }

    /// Lets its shadow end, if that is about to.
    pub fn let_go(&self) {
        if let Some(shadow) = self.shadow() {
            shadow.let_go();
        }
    }

    /// Undoes [`Source::prepare_to_outlive`].
    pub fn end_with_tree(&self) {
        if let Some(shadow) = self.shadow() {
            shadow.end_at_once();
        }
    }

    /// If its shadow is about to end, all that it has is copied out, which takes as much memory and some time, and it is let go.
    ///
    /// # Errors
    ///
    /// Refused if there is no memory; or the kernel was faster. The shadow was let go.
    pub fn outlive(&self) -> Result<()> {
        self.in_ram()
            .map_or(Ok(()), |resident| resident.base.outlive())
    }

    fn described(&self) -> Option<&Described> {
        self.in_ram()
            .and_then(|resident| resident.described.as_ref())
    }

    /// Reads ranges of whole pages of the address space as they were, one after the other, into `buffer`.
    ///
    /// # Errors
    ///
    /// The shadow or the image can't be read.
    pub fn read(&self, spans: &[Span], buffer: &mut [u8]) -> std::io::Result<()> {
        match self {
            Self::Resident(resident) => resident.read(spans, buffer),
            Self::Stored(stored) => read_spans(&*stored.pages, spans, buffer),
        }
    }

    /// What reads pages of the address space as they were.
    pub(super) fn reader(&self) -> Box<dyn PageReader + '_> {
        match self {
            Self::Resident(resident) => Box::new(ResidentReader {
                resident,
                bytes: Vec::new(),
            }),
            Self::Stored(stored) => stored.pages.reader(),
        }
    }

    /// The text of `smaps` (proc_pid_smaps(5)), or the part of it that tells flags. Of a shadow it walks page tables, so that
    /// it takes time.
    ///
    /// # Errors
    ///
    /// The shadow has died.
    pub fn smaps(&self) -> Result<String> {
        match (self.described(), self.stored(), self) {
            (Some(described), ..) => Ok(smaps::text(&described.flags)),
            (None, Some(stored), _) => Ok(stored.smaps.clone()),
            (None, None, of) => smaps(of.pid()),
        }
    }

    /// The text of `numa_maps` (numa(7)) if it tells of another policy than the default, be it that of the task. Walks page
    /// tables.
    ///
    /// # Errors
    ///
    /// The shadow has died.
    pub fn policies(&self) -> Result<Option<String>> {
        match (self.described(), self.stored()) {
            (Some(described), _) => Ok(described.policies.clone()),
            (None, Some(stored)) => Ok(stored.policies.clone()),
            (None, None) => policies(self.pid()),
        }
    }

    /// VMAs and flags, for mapping again what was there.
    pub(super) fn mapped(&self) -> Result<Mapped> {
        let vmas = match self {
            Self::Resident(resident) => resident.base.vmas()?.to_vec(),
            Self::Stored(_) => Vec::new(),
        };
        let flags = smaps::parse(&self.smaps()?);
        Ok(Mapped { vmas, flags })
    }

    /// The guards (`MADV_GUARD_INSTALL`, Linux 6.13) of an address space of this layout.
    ///
    /// # Errors
    ///
    /// The shadow has died.
    pub fn guards(&self, layout: &Layout) -> Result<Ranges> {
        if let Some(described) = self.described() {
            return Ok(described.guards.clone());
        }
        match (self.stored(), self.shadow()) {
            (None, Some(shadow)) => {
                let mut found = Vec::new();
                layout
                    .scan(&shadow.pagemap, Scan::Guards, Span::ALL, &mut found)
                    .map_err(|errno| system(shadow.pid, "scan a shadow for guards", errno))?;
                Ok(found.iter().map(Span::from).collect())
            }
            (stored, _) => Ok(stored.map_or_else(Ranges::new, |stored| stored.guards.clone())),
        }
    }

    /// Where the parts of the program are (fields of `/proc/PID/stat`).
    ///
    /// # Errors
    ///
    /// The shadow has died.
    pub fn bounds(&self) -> Result<Bounds> {
        match (self.described(), self.stored()) {
            (Some(described), _) => Ok(described.bounds),
            (None, Some(stored)) => Ok(stored.bounds),
            (None, None) => bounds(self.pid()),
        }
    }

    /// The auxiliary vector (getauxval(3)).
    ///
    /// # Errors
    ///
    /// The shadow has died.
    pub fn auxv(&self) -> Result<Vec<u8>> {
        match (self.described(), self.stored()) {
            (Some(described), _) => Ok(described.auxv.clone()),
            (None, Some(stored)) => Ok(stored.auxv.clone()),
            (None, None) => auxv(self.pid()),
        }
    }

    /// The program's file, open for reading, and its path as the link in `/proc` tells it. An increment has that of its shadow.
    ///
    /// # Errors
    ///
    /// The shadow has died, or we may open no more files.
    pub fn program(&self) -> Result<(File, PathBuf)> {
        let failed = |error| system(self.pid(), "open the program of a checkpoint", error);
        if let Some(stored) = self.stored() {
            let file = reopened(&stored.program, false).map_err(failed)?;
            return Ok((file, stored.program_path.clone()));
        }
        let file = File::open(procfs::path(self.pid(), "exe")).map_err(failed)?;
        let link = format!("/proc/self/fd/{}", file.as_raw_fd());
        let path = std::fs::read_link(link)
            .map_err(|error| system(self.pid(), "tell the path of its program", error))?;
        Ok((file, path))
    }

    /// Opens the file behind one of its VMAs: an `O_PATH` descriptor, or one to read.
    pub(super) fn pin_mapped(&self, vma: &Vma) -> std::io::Result<File> {
        match self.stored() {
            Some(stored) => match stored.files.get(&(vma.device, vma.inode)) {
                Some(file) => file.try_clone(),
                None => Err(std::io::ErrorKind::NotFound.into()),
            },
            None => kept::pin(self.pid(), vma),
        }
    }

    /// The shadow's PID, or ours if there is none.
    fn pid(&self) -> Pid {
        self.shadow().map_or(Pid::this(), |shadow| shadow.pid)
    }

    /// Device and inode of the program's file, if that can be had.
    pub(super) fn program_inode(&self) -> Option<(u64, u64)> {
        let metadata = match self.stored() {
            Some(stored) => stored.program.metadata(),
            None => std::fs::metadata(procfs::path(self.pid(), "exe")),
        };
        metadata
            .ok()
            .map(|metadata| (metadata.dev(), metadata.ino()))
    }
}

/// Reads spans, one after the other, into a buffer.
pub(super) fn read_spans(
    pages: &dyn Pages,
    spans: &[Span],
    buffer: &mut [u8],
) -> std::io::Result<()> {
    let (mut reader, mut rest) = (pages.reader(), buffer);
    for span in spans {
        let (here, after) = rest.split_at_mut(span.len() as usize);
        read_span(&mut *reader, *span, here)?;
        rest = after;
    }
    Ok(())
}

/// Reads a span into a buffer.
pub(super) fn read_span(
    reader: &mut dyn PageReader,
    span: Span,
    buffer: &mut [u8],
) -> std::io::Result<()> {
    reader.look(span, &mut |part, bytes| {
        let from = (part.start - span.start) as usize;
        let here = &mut buffer[from..from + part.len() as usize];
        match bytes {
            Some(bytes) => here.copy_from_slice(bytes),
            None => here.fill(0),
        }
        Ok(())
    })
}

impl Stored {
    /// Opens the file behind a recorded VMA, if it is known; to write, if that can be.
    pub(super) fn open_mapped(&self, vma: &Vma) -> Option<std::io::Result<File>> {
        let file = self.files.get(&(vma.device, vma.inode))?;
        Some(reopened(file, vma.shared).or_else(|_| reopened(file, false)))
    }
}

/// The text of a shadow's `smaps`.
pub(super) fn smaps(pid: Pid) -> Result<String> {
    let text = std::fs::read(procfs::path(pid, "smaps"))
        .map_err(|error| system(pid, "read the flags of a shadow", error))?;
    Ok(String::from_utf8_lossy(&text).into_owned())
}

/// The text of the `numa_maps` of a process, if it tells of another policy than the default.
pub(super) fn policies(pid: Pid) -> Result<Option<String>> {
    let text = match std::fs::read(procfs::path(pid, "numa_maps")) {
        Ok(text) => text,
        // The kernel was built without NUMA.
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(system(pid, "read its memory policies", error)),
    };
    let text = String::from_utf8_lossy(&text).into_owned();
    let policy = |line: &str| line.split(' ').nth(1) != Some("default");
    Ok(text.lines().any(policy).then_some(text))
}

/// Where the parts of a shadow's program are.
pub(super) fn bounds(pid: Pid) -> Result<Bounds> {
    procfs::Stat::read(pid)
        .map(|stat| stat.bounds())
        .map_err(|error| system(pid, "read the stat of a shadow", error))
}

/// A shadow's auxiliary vector.
pub(super) fn auxv(pid: Pid) -> Result<Vec<u8>> {
    std::fs::read(procfs::path(pid, "auxv"))
        .map_err(|error| system(pid, "read the auxv of a shadow", error))
}

/// A description of its own of a file that is open.
fn reopened(file: &File, write: bool) -> std::io::Result<File> {
    let path = format!("/proc/self/fd/{}", file.as_raw_fd());
    OpenOptions::new()
        .read(true)
        .write(write)
        .open(Path::new(&path))
}
