//! Records the files of an area.

use std::collections::HashSet;
use std::ffi::OsStr;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::sync::Arc;

use rustix::fs::OFlags;

use super::area::Area;
use super::content::{Source, first_difference};
use super::image::{AreaImage, Nameless};
use super::journal::Journal;
use super::known::{Inodes, Read};
use super::meta::{Meta, Time, stat};
use super::mounted::{Mounted, file_error, open_file, own_file};
use super::store::{From, Store};
use super::tree::{Content, Node, Tree};
use super::uses::{Use, exposed};
use super::walk::{At, Watched, walk};
use super::{Error, Result};

/// Files of that size and more are shared rather than compared, in bytes.
pub const BIG: u64 = 1 << 20;

/// Whether a file has the content that it had when it was read last: compares it.
pub fn recognize(mounted: &Mounted, known: &Inodes, at: At<'_>, node: &mut Node) -> io::Result<()> {
    let last = Node {
        content: known.last(node.meta.stat.ino),
        ..node.clone()
    };
    match &last.content {
        Content::Unknown => return Ok(()),
        // Putting it back, and keeping it anew, takes less than comparing it.
        Content::Kept(kept) if kept.is_shared() && kept.size >= BIG => return Ok(()),
        _ => {}
    }
    let wanted = super::execute::Wanted::open(mounted, &last)?;
    if wanted.source().size() == node.meta.stat.size {
        let live = open_file(at.directory, at.name, OFlags::RDONLY)?;
        if first_difference(&live, wanted.source())?.is_none() {
            node.content = last.content;
        }
    }
    Ok(())
}

/// Walks an area and keeps all content that is not kept yet.
fn keep(
    mounted: &Mounted,
    known: &Inodes,
    store: &mut Store,
    watched: Watched<'_>,
) -> Result<Tree> {
    let mut refused = None;
    let tree = walk(mounted, known, watched, &mut |at, node| {
        if refused.is_some() {
            return Ok(());
        }
        recognize(mounted, known, at, node)?;
        if matches!(node.content, Content::Unknown) {
            let live = open_file(at.directory, at.name, OFlags::RDONLY)?;
            let own = own_file(at, OFlags::RDONLY)?;
            let stat = &node.meta.stat;
            let from = From {
                live: &live,
                own: own.as_ref(),
            };
            match store.keep(from, stat.size, stat.device, &mounted.beside) {
                Ok(kept) => node.content = Content::Kept(kept),
                Err(Error::File { error, .. }) => return Err(error),
                Err(error) => refused = Some(error),
            }
        }
        Ok(())
    });
    match refused {
        Some(error) => Err(error),
        None => tree,
    }
}

/// Keeps content before the tree is stopped for a checkpoint, in which only what changes meanwhile is left to be done.
/// `mapped` are the inodes that are mapped by somebody, as seen at `since` or later. `device` is the area's, as in `mapped`.
pub fn keep_early(
    mounted: &Mounted,
    device: u64,
    known: &mut Inodes,
    store: &mut Store,
    journal: &mut Journal,
    (since, mapped): (Time, &HashSet<(u64, u64)>),
) -> Result<()> {
    let tree = keep(mounted, known, store, Watched::Running(journal))?;
    for node in &tree.nodes {
        let stat = &node.meta.stat;
        if !stat.is_file() || known.find(stat, true).1 == node.content {
            continue;
        }
        // Stores to a mapping that was made later change times once.
        let is_exposed = stat.ctime >= since
            || [stat.ino, stat.shown.1]
                .iter()
                .any(|ino| mapped.contains(&(device, *ino)));
        let read = match is_exposed {
            true => Read::Exposed,
            false => Read::Running,
        };
        known.learn(Arc::clone(&node.meta), node.content.clone(), read);
    }
    Ok(())
}

/// Records an area of a stopped tree, and keeps all content that is not kept yet.
pub fn capture(
    mounted: &Mounted,
    area: Area,
    known: &mut Inodes,
    store: &mut Store,
    watched: Watched<'_>,
    uses: &[Use],
) -> Result<AreaImage> {
    let tree = keep(mounted, known, store, watched)?;
    let exposed = exposed(uses, &area, &tree, known.trust());
    *known = Inodes::new(known.trust());
    for node in &tree.nodes {
        let read = match exposed.contains(&node.meta.stat.ino) {
            true => Read::Exposed,
            false => Read::Stopped,
        };
        known.learn(Arc::clone(&node.meta), node.content.clone(), read);
    }
    let nameless = nameless(mounted, &area, store, uses)?;
    Ok(AreaImage {
        area,
        tree,
        nameless,
    })
}

/// Files of an area that have no name and are in use.
fn nameless(
    mounted: &Mounted,
    area: &Area,
    store: &mut Store,
    uses: &[Use],
) -> Result<Vec<Nameless>> {
    let mut found: Vec<Nameless> = Vec::new();
    for using in uses
        .iter()
        .filter(|using| using.links == 0 && using.is_in(area))
    {
        let shown = (using.device, using.ino);
        if found.iter().any(|file| file.meta.stat.shown == shown) {
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
        let content = store.keep(
            From {
                live: &live,
                own: None,
            },
            meta.stat.size,
            meta.stat.device,
            &mounted.beside,
        )?;
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
