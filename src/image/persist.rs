//! Writes an image.

use std::collections::BTreeSet;
use std::fs::File;
use std::io::BufWriter;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};

use serde::{Deserialize, Serialize};
use zerocopy::IntoBytes;

use super::behind::WriteBehind;
use super::contents::{KeptPages, NamelessPages, whole};
use super::layout::{Encoding, MappedFile, Program};
use super::parts::{DELETED, Nameless, NamelessContent, Parts, describe};
use super::staging::Staging;
use super::write::{Content, Writer};
use super::{CONTEXT_FILE, Error, MARK_FILE, MEMORY_FILE, Opened, Result};
use crate::fault;
use crate::kernel::memory_file::memory_file;
use crate::memory::{Ranges, SpaceContent};
use crate::record::{Context, Frames, Kind, ObjectId};

/// How an image is written.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Options {
    /// How pages are.
    pub encoding: Encoding,
    /// What the checkpoint is called there, if not as in RAM.
    pub name: Option<String>,
    /// Leave in the shadows what they have of pages: only [`Opened::open_lent`](super::Opened::open_lent) reads that, and only
    /// as long as the checkpoint is there. Nothing is synced then.
    pub lend: bool,
}

/// How far the writing of an image is; shared with who waits for it, and may cancel it.
#[derive(Debug, Default)]
pub struct Progress {
    done: AtomicU64,
    total: AtomicU64,
    cancelled: OnceLock<Why>,
}

/// Why the writing of an image was cancelled.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Why {
    /// Who asked for it has gone, or does not want it any more.
    Unwanted,
    /// The checkpoint was released or replaced.
    Released,
    /// The keeper ends.
    Ending,
}

impl std::fmt::Display for Why {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Unwanted => "nobody waits for it any more",
            Self::Released => "the checkpoint was released",
            Self::Ending => "the keeper has ended",
        })
    }
}

/// What was written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Summary {
    /// Bytes of memory that were looked at.
    pub memory_bytes: u64,
    /// Bytes of the image.
    pub image_bytes: u64,
    /// Bytes of it that are headers: the context.
    pub header_bytes: u64,
}

impl Progress {
    /// Bytes of memory that are done, and bytes in all; both 0 before that is known.
    pub fn bytes(&self) -> (u64, u64) {
        (
            self.done.load(Ordering::Relaxed),
            self.total.load(Ordering::Relaxed),
        )
    }

    /// Has the writing end as soon as can be, with an error. The first reason counts.
    pub fn cancel(&self, why: Why) {
        let _ = self.cancelled.set(why);
    }

    /// Why it was cancelled, if it was.
    pub fn cancelled(&self) -> Option<Why> {
        self.cancelled.get().copied()
    }

    pub(super) fn advance(&self, bytes: u64) {
        self.done.fetch_add(bytes, Ordering::Relaxed);
    }

    pub(super) fn check(&self) -> Result<()> {
        match self.cancelled() {
            Some(why) => Err(Error::Cancelled(why)),
            None => Ok(()),
        }
    }
}

/// Writes an image to the directory `target`, which appears whole or not at all; one that is there is replaced.
///
/// # Errors
///
/// Cancelled, the checkpoint was released meanwhile, or the image can't be written. What was at `target` is still there.
pub fn persist(
    parts: Parts,
    target: &Path,
    options: Options,
    progress: &Progress,
) -> Result<Summary> {
    let written = write(parts, target, options, progress);
    // What was cancelled may have failed of that: a shadow has gone.
    written.or_else(|error| progress.check().and(Err(error)))
}

/// Makes an image that is nowhere but in RAM, pages and all, and opens it.
///
/// # Errors
///
/// The checkpoint can't be read, or there is no memory.
pub fn in_ram(parts: Parts) -> Result<Opened> {
    let path = Path::new("memory.img in RAM");
    let failed = |what| Error::file(what, path);
    let context = Arc::clone(&parts.context);
    let file = memory_file(c"snapback image", &[]).map_err(failed("create"))?;
    let written = file.try_clone().map_err(failed("create"))?;
    write_memory(
        parts,
        path,
        written,
        Options::default(),
        &Progress::default(),
    )?;
    let frames = Frames::open(file).map_err(Error::image(path))?;
    Opened::of(context, frames, path.to_owned())
}

fn write(parts: Parts, target: &Path, options: Options, progress: &Progress) -> Result<Summary> {
    progress.check()?;
    let staging = Staging::begin(target)?;
    fault::point("persist.begun");
    let (path, file) = staging.create(CONTEXT_FILE)?;
    let is_durable = !options.lend;
    let header_bytes = write_context(&parts.context, &path, file, is_durable)?;
    fault::point("persist.context");
    staging.create(MARK_FILE)?;
    let (path, file) = staging.create(MEMORY_FILE)?;
    let memory_bytes = write_memory(parts, &path, file, options, progress)?;
    fault::point("persist.memory");
    let (memory, _) = progress.bytes();
    progress.check()?;
    staging.publish(is_durable)?;
    fault::point("persist.published");
    Ok(Summary {
        memory_bytes: memory,
        image_bytes: header_bytes + memory_bytes,
        header_bytes,
    })
}

fn write_context(context: &Context, path: &Path, file: File, is_durable: bool) -> Result<u64> {
    let failed = |what| Error::file(what, path);
    let mut file = BufWriter::with_capacity(1 << 20, file);
    context.write_out(&mut file).map_err(Error::image(path))?;
    let file = file
        .into_inner()
        .map_err(|error| failed("write")(error.into_error()))?;
    if is_durable {
        file.sync_all().map_err(failed("sync"))?;
    }
    Ok(context.stats().bytes)
}

/// Writes all that the context does not hold; returns the length of it.
fn write_memory(
    mut parts: Parts,
    path: &Path,
    file: File,
    options: Options,
    progress: &Progress,
) -> Result<u64> {
    let failed = |what| Error::file(what, path);
    let wrong = Error::image(path);
    let header = parts.context.image_header();
    let header = header.ok_or_else(|| wrong(crate::record::Error::Unfinished))?;
    let sink = file.try_clone().and_then(WriteBehind::start);
    let sink = sink.map_err(failed("write"))?;
    let mut context =
        Context::streaming_beside(Box::new(sink), header).map_err(Error::image(path))?;
    context
        .put_json(Kind::Segments, ObjectId::IMAGE, &parts.segments)
        .map_err(Error::image(path))?;
    let shared = parts.shared_inodes()?;
    for space in &parts.spaces {
        progress.check()?;
        let found = write_space(&mut context, path, space, &shared)?;
        for (file, pin) in found {
            let is_known = |known: &Nameless| {
                (known.file.device, known.file.inode) == (file.device, file.inode)
            };
            if !parts.nameless.iter().any(is_known) {
                parts.nameless.push(Nameless {
                    file,
                    content: NamelessContent::Live(pin),
                });
            }
        }
    }
    fault::point("persist.spaces");

    let mut contents: Vec<(Box<dyn Content + '_>, Ranges)> = Vec::new();
    for space in &parts.spaces {
        let mut ranges = space.ranges()?;
        if options.lend
            && let Some((header, lent)) = space.lender()?
        {
            ranges = ranges.difference(&lent);
            context
                .put(Kind::Lender, space.id, &header, lent.spans().as_bytes())
                .map_err(Error::image(path))?;
        }
        contents.push((Box::new(space), ranges));
    }
    for shared in &parts.shared {
        let data = whole(shared.data.spans().iter().copied());
        contents.push((Box::new(shared), data));
    }
    for (nameless, number) in parts.nameless.iter().zip(parts.last_id() + 1..) {
        let id = ObjectId::from_raw(number).unwrap_or(ObjectId::IMAGE);
        context
            .put_json(Kind::NamelessFile, id, &nameless.file)
            .map_err(Error::image(path))?;
        let failed = |error| Error::Source {
            what: format!("cannot read the file {}", nameless.file.path.display()),
            error,
        };
        let pages = NamelessPages::open(id, nameless).map_err(failed)?;
        let ranges = pages.ranges().map_err(failed)?;
        contents.push((Box::new(pages), ranges));
    }
    let mut last = parts.last_id() + parts.nameless.len() as u64;
    let mut next = || {
        last += 1;
        ObjectId::from_raw(last).unwrap_or(ObjectId::IMAGE)
    };
    for (area, kept) in &parts.files {
        context
            .put_json(Kind::FileArea, next(), area)
            .map_err(Error::image(path))?;
        for kept in kept {
            let pages = KeptPages::new(next(), kept);
            let ranges = pages.ranges();
            contents.push((Box::new(pages), ranges));
        }
    }
    let (contents, ranges): (Vec<_>, Vec<_>) = contents.into_iter().unzip();
    let total = ranges.iter().map(Ranges::bytes).sum();
    progress.total.store(total, Ordering::Relaxed);
    let mut writer = Writer::new(&mut context, path, options.encoding, progress, &contents);
    for (number, ranges) in ranges.iter().enumerate() {
        writer.write(number, ranges)?;
        fault::point("persist.pages");
    }
    let page_records = writer.records();
    let info = super::layout::Info {
        name: options.name.unwrap_or_else(|| parts.info.name.clone()),
        page_records,
        nameless_files: parts.nameless.len() as u64,
        ..parts.info.clone()
    };
    context
        .put_json(Kind::Checkpoint, ObjectId::IMAGE, &info)
        .and_then(|_| context.finish())
        .map_err(Error::image(path))?;
    if !options.lend {
        file.sync_all().map_err(failed("sync"))?;
    }
    Ok(context.stats().bytes)
}

/// Writes what only a shadow tells of an address space, and finds the nameless files that it shows.
fn write_space(
    context: &mut Context,
    path: &Path,
    space: &SpaceContent,
    shared: &BTreeSet<(u64, u64)>,
) -> Result<Vec<(super::layout::NamelessFile, File)>> {
    let id = space.id;
    let mut nameless = Vec::new();
    let mut files = Vec::new();
    for vma in space.mapped()? {
        let name = vma.name.strip_suffix(DELETED.as_bytes());
        let plain = PathBuf::from(std::ffi::OsStr::from_bytes(name.unwrap_or(&vma.name)));
        let is_shared_memory = shared.contains(&(vma.device, vma.inode));
        let pinned = space.pin_mapped(&vma);
        let pinned = pinned.and_then(|file| Ok((file.metadata()?, file)));
        let (metadata, file) = pinned.map_err(|error| Error::Source {
            what: format!("cannot look at the mapped file {}", plain.display()),
            error,
        })?;
        let has_name = metadata.nlink() > 0;
        files.push(MappedFile {
            device: vma.device,
            inode: vma.inode,
            path: plain.clone(),
            size: metadata.len(),
            modified_ns: metadata.mtime() * 1_000_000_000 + metadata.mtime_nsec(),
            nameless: !has_name,
        });
        if !has_name && !is_shared_memory && metadata.is_file() {
            let mut found = describe(&metadata, plain, Vec::new());
            (found.device, found.inode) = (vma.device, vma.inode);
            nameless.push((found, file));
        }
    }
    let (program_path, program) = space.program()?;
    let metadata = program
        .metadata()
        .map_err(Error::file("look at", &program_path))?;
    let program = Program {
        path: program_path,
        device: metadata.dev(),
        inode: metadata.ino(),
        files,
    };
    let write = |error| Error::image(path)(error);
    context
        .put_json(Kind::Program, id, &program)
        .map_err(write)?;
    context
        .append(Kind::MemoryFlags, id, &[space.smaps()?.as_bytes()])
        .map_err(write)?;
    context
        .append(Kind::ProgramBounds, id, &[space.bounds()?.as_bytes()])
        .map_err(write)?;
    context
        .append(Kind::AuxiliaryVector, id, &[&space.auxv()?])
        .map_err(write)?;
    context
        .put_list(Kind::Guards, id, space.guards()?.spans())
        .map_err(write)?;
    if let Some(policies) = space.policies()? {
        context
            .append(Kind::MemoryPolicies, id, &[policies.as_bytes()])
            .map_err(write)?;
    }
    Ok(nameless)
}
