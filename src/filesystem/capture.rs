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
use super::index::Index;
use super::journal::Journal;
use super::known::{Inodes, Read};
use super::meta::{Meta, Time, stat};
use super::mounted::{Mounted, file_error, open_file, own_file};
use super::patch::patch;
use super::store::{From, Store};
use super::touched::Touched;
use super::tree::{Content, Node, Tree};
use super::uses::{Use, exposed, shown};
use super::walk::{At, Unknown, Watched, walk, walk_among};
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

/// Walks an area, by `walk`, and keeps all content that is not kept yet.
fn keep<T>(
    mounted: &Mounted,
    known: &Inodes,
    store: &mut Store,
    walk: impl FnOnce(Unknown<'_>) -> Result<T>,
) -> Result<T> {
    let mut refused = None;
    let done = walk(&mut |at, node| {
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
        None => done,
    }
}

/// The files of an area as they were found while the tree ran, or are those of a checkpoint: what has changed since is told by
/// the journal of inodes.
#[derive(Debug)]
pub struct Base {
    /// The files.
    pub tree: Tree,
    /// What is where among them.
    pub index: Index,
    /// The moment at which they were equal to the live ones. `None`: what was not looked at since may differ.
    pub moment: Option<u64>,
}

impl Base {
    /// Those of a checkpoint.
    pub fn of(tree: &Tree, moment: Option<u64>) -> Self {
        Self {
            moment,
            ..Self::found(tree.clone())
        }
    }

    /// As they were found.
    fn found(tree: Tree) -> Self {
        Self {
            index: Index::of(&tree),
            tree,
            moment: None,
        }
    }

    /// What may differ now. `None`: anything.
    fn among(&self, known: &Inodes, touched: &Touched, device: u64) -> Option<HashSet<u64>> {
        let mut among = match self.moment {
            Some(moment) => touched.since(device, moment)?,
            None => touched.pending(device),
        };
        among.extend(known.exposed());
        Some(among)
    }
}

/// Whether names of a recorded inode that is not `among` may be missing in one of these trees: it has several, and one or its
/// directory has another name now.
pub fn lacks_names<const N: usize>(cut: [&Tree; N], index: &Index, among: &HashSet<u64>) -> bool {
    let nodes = cut.into_iter().flat_map(|tree| &tree.nodes);
    let mut stats = nodes.map(|node| &node.meta.stat);
    stats.any(|stat| {
        let is_linked = stat.links > 1 && !stat.is_directory();
        is_linked && !among.contains(&stat.ino) && index.nodes(stat.ino).next().is_some()
    })
}

/// How much there is that may have changed since, in bytes and files, to be kept.
pub fn measure(
    mounted: &Mounted,
    known: &Inodes,
    base: &Base,
    (touched, device): (&Touched, u64),
) -> Result<(u64, usize)> {
    let Some(among) = base.among(known, touched, device) else {
        return Ok((u64::MAX, usize::MAX));
    };
    let (mut bytes, mut files) = (0, 0);
    let mut count = |_: At<'_>, node: &mut Node| {
        bytes += node.meta.stat.size;
        files += 1;
        Ok(())
    };
    let recorded = (&base.tree, &base.index);
    walk_among(
        mounted,
        known,
        Watched::Glance,
        &mut count,
        recorded,
        &among,
    )?;
    Ok((bytes, files))
}

/// Keeps content while the tree runs, with the journal of inodes, which was taken before; all calls that were under way then have
/// ended. `early` as for [`keep_early`].
pub fn keep_early_among(
    mounted: &Mounted,
    area: &Area,
    known: &mut Inodes,
    store: &mut Store,
    base: Option<Base>,
    (touched, device): (&mut Touched, u64),
    early: (Time, &HashSet<(u64, u64)>),
) -> Result<Base> {
    if let Some(base) = base
        && let Some(among) = base.among(known, touched, device)
    {
        let watched = Watched::Inodes {
            touched: &mut *touched,
            device,
            running: true,
        };
        let recorded = (&base.tree, &base.index);
        let (was, live) = keep(mounted, known, store, |unknown| {
            walk_among(mounted, known, watched, unknown, recorded, &among)
        })?;
        learn_early(known, area.device, &live, early);
        if !lacks_names([&was, &live], &base.index, &among) {
            return Ok(Base::found(patch(base.tree, &was, &live)));
        }
    }
    let watched = Watched::Inodes {
        touched,
        device,
        running: true,
    };
    let tree = keep(mounted, known, store, |unknown| {
        walk(mounted, known, watched, unknown)
    })?;
    learn_early(known, area.device, &tree, early);
    Ok(Base::found(tree))
}

/// Keeps content before the tree is stopped for a checkpoint, in which only what changes meanwhile is left to be done.
/// `mapped` are the inodes that are mapped by somebody, as seen at `since` or later. `device` is the area's, as in `mapped`.
pub fn keep_early(
    mounted: &Mounted,
    device: u64,
    known: &mut Inodes,
    store: &mut Store,
    journal: &mut Journal,
    early: (Time, &HashSet<(u64, u64)>),
) -> Result<()> {
    let tree = keep(mounted, known, store, |unknown| {
        walk(mounted, known, Watched::Running(journal), unknown)
    })?;
    learn_early(known, device, &tree, early);
    Ok(())
}

fn learn_early(
    known: &mut Inodes,
    device: u64,
    tree: &Tree,
    (since, mapped): (Time, &HashSet<(u64, u64)>),
) {
    for node in &tree.nodes {
        let stat = &node.meta.stat;
        if stat.is_file() && known.find(stat, true).1 == node.content {
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
    let tree = keep(mounted, known, store, |unknown| {
        walk(mounted, known, watched, unknown)
    })?;
    let nodes = shown(&tree.nodes);
    let find = |number| nodes.get(&number).into_iter().flatten().copied();
    let exposed = exposed(uses, &area, known.trust(), find);
    *known = Inodes::new(known.trust());
    learn(known, &tree, &exposed);
    let nameless = nameless(mounted, &area, store, uses)?;
    Ok(AreaImage::new(area, tree, nameless))
}

/// The same by what is the `base`, and the journal of inodes. `None`: that does not do.
pub fn capture_among(
    mounted: &Mounted,
    area: &Area,
    known: &mut Inodes,
    store: &mut Store,
    base: Base,
    (touched, device): (&mut Touched, u64),
    uses: &[Use],
) -> Result<Option<AreaImage>> {
    let Some(among) = base.among(known, touched, device) else {
        return Ok(None);
    };
    let watched = Watched::Inodes {
        touched,
        device,
        running: false,
    };
    let recorded = (&base.tree, &base.index);
    let (was, live) = keep(mounted, known, store, |unknown| {
        walk_among(mounted, known, watched, unknown, recorded, &among)
    })?;
    if lacks_names([&was, &live], &base.index, &among) {
        return Ok(None);
    }
    let new = shown(&live.nodes);
    let find = |number| {
        let old = base.index.shown(number).map(|node| &base.tree.nodes[node]);
        let new = new.get(&number).into_iter().flatten().copied();
        old.chain(new)
    };
    let exposed = exposed(uses, area, known.trust(), find);
    learn(known, &live, &exposed);
    exposed.iter().for_each(|number| known.expose(*number));
    let nameless = nameless(mounted, area, store, uses)?;
    let tree = patch(base.tree, &was, &live);
    Ok(Some(AreaImage::new(area.clone(), tree, nameless)))
}

fn learn(known: &mut Inodes, tree: &Tree, exposed: &HashSet<u64>) {
    for node in &tree.nodes {
        let read = match exposed.contains(&node.meta.stat.ino) {
            true => Read::Exposed,
            false => Read::Stopped,
        };
        known.learn(Arc::clone(&node.meta), node.content.clone(), read);
    }
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
