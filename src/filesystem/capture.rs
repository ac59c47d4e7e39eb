//! Records the files of an area.

use std::collections::HashMap;
use std::ffi::OsStr;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::sync::Arc;

use rustix::fs::OFlags;

use super::Result;
use super::area::Area;
use super::content::{Source, first_difference};
use super::image::{AreaImage, Nameless};
use super::known::Inodes;
use super::meta::{Meta, stat};
use super::mounted::{Mounted, file_error, open_file};
use super::store::Store;
use super::tree::{Content, Node};
use super::uses::{How, Use};
use super::walk::walk;

/// Whether a file has the content that it had when it was read last: compares it.
pub fn recognize(
    mounted: &Mounted,
    known: &Inodes,
    directory: BorrowedFd<'_>,
    name: &OsStr,
    node: &mut Node,
) -> io::Result<()> {
    let last = Node {
        content: known.last(node.meta.stat.ino),
        ..node.clone()
    };
    if matches!(last.content, Content::Unknown) {
        return Ok(());
    }
    let wanted = super::execute::Wanted::open(mounted, &last)?;
    if wanted.source().size() == node.meta.stat.size {
        let live = open_file(directory, name, OFlags::RDONLY)?;
        if first_difference(&live, wanted.source())?.is_none() {
            node.content = last.content;
        }
    }
    Ok(())
}

/// Records an area of a stopped tree, and keeps all content that is not kept yet.
pub fn capture(
    mounted: &Mounted,
    area: Area,
    known: &mut Inodes,
    store: &mut Store,
    uses: &[Use],
) -> Result<AreaImage> {
    let mut refused = None;
    let tree = walk(mounted, known, &mut |directory, name, node| {
        recognize(mounted, known, directory, name, node)?;
        if matches!(node.content, Content::Unknown) {
            let live = open_file(directory, name, OFlags::RDONLY)?;
            let stat = &node.meta.stat;
            match store.keep(&live, stat.size, stat.device, &mounted.beside) {
                Ok(kept) => node.content = Content::Kept(kept),
                Err(error) => {
                    refused = Some(error);
                    return Err(io::Error::other("its content can't be kept"));
                }
            }
        }
        Ok(())
    });
    let tree = tree.map_err(|error| refused.unwrap_or(error))?;
    let device = tree.nodes[super::tree::ROOT].meta.stat.device;
    let mapped: HashMap<u64, bool> = uses
        .iter()
        .filter(|using| using.device == device && using.how == How::Mapped)
        .map(|using| (using.ino, true))
        .collect();
    *known = Inodes::new(known.trust());
    for node in &tree.nodes {
        let is_mapped = mapped.contains_key(&node.meta.stat.ino);
        known.learn(Arc::clone(&node.meta), node.content.clone(), is_mapped);
    }
    let nameless = nameless(mounted, store, uses, device)?;
    Ok(AreaImage {
        area,
        tree,
        nameless,
    })
}

/// Files of the device that have no name and are in use.
fn nameless(
    mounted: &Mounted,
    store: &mut Store,
    uses: &[Use],
    device: u64,
) -> Result<Vec<Nameless>> {
    let mut found: Vec<Nameless> = Vec::new();
    for using in uses.iter().filter(|using| using.device == device) {
        if found.iter().any(|file| file.meta.stat.ino == using.ino) {
            continue;
        }
        let failed = || file_error("look at", &using.link);
        let pin = open_link(&using.link, libc::O_PATH).map_err(failed())?;
        let pin = OwnedFd::from(pin);
        let now = stat(pin.as_fd(), OsStr::new("")).map_err(failed())?;
        if now.links > 0 || !now.is_file() {
            continue;
        }
        let meta = Meta::read(pin.as_fd(), OsStr::new(""), now);
        let meta = match meta {
            Ok(meta) => meta,
            Err(error) => return Err(failed()(error)),
        };
        let live = open_link(&using.link, libc::O_NOATIME).map_err(failed())?;
        let content = store.keep(&live, meta.stat.size, device, &mounted.beside)?;
        found.push(Nameless {
            pin,
            meta: Arc::new(meta),
            content,
            holder: format!("{} of {}", using.what, using.holder),
        });
    }
    Ok(found)
}

/// Opens what a link of `/proc` leads to, for reading.
fn open_link(link: &Path, flags: i32) -> io::Result<File> {
    OpenOptions::new()
        .read(true)
        .custom_flags(flags | libc::O_NONBLOCK)
        .open(link)
}

/// Whether a file without a name differs.
pub fn differs(file: &Nameless) -> io::Result<bool> {
    let (itself, none) = (file.pin.as_fd(), OsStr::new(""));
    let now = Meta::read(itself, none, stat(itself, none)?)?;
    if !now.has_same_rights(&file.meta) || now.stat.mtime != file.meta.stat.mtime {
        return Ok(true);
    }
    let live = open_link(&file.link(), libc::O_NOATIME)?;
    Ok(first_difference(&live, Source::Kept(&file.content))?.is_some())
}
