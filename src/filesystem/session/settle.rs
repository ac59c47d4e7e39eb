//! The end of a rollback: what other parts of it have changed, and what is known of files now.

use std::collections::HashMap;
use std::ffi::OsStr;
use std::os::fd::AsFd;
use std::path::PathBuf;
use std::sync::Arc;

use super::{Files, Mounts, Plans};
use crate::filesystem::Result;
use crate::filesystem::execute::set_times;
use crate::filesystem::image::Image;
use crate::filesystem::known::Read;
use crate::filesystem::meta::{Meta, Stat};
use crate::filesystem::mounted::{descend, split};
use crate::filesystem::rebound::{rebound, visited};
use crate::filesystem::tree::{Node, Tree};
use crate::filesystem::uses::{Use, exposed, shown};

impl Files {
    /// After all else went back: times that this has changed, and what is known now. `to` is the checkpoint among `images`;
    /// `directories` those, as the tree sees them, in which names may have come and gone.
    ///
    /// # Errors
    ///
    /// Those of the kernel; the tree must be killed.
    pub fn settle(
        &mut self,
        mounts: &Mounts,
        images: &mut [&mut Image],
        to: usize,
        plans: &Plans,
        uses: &[Use],
        directories: &[PathBuf],
    ) -> Result<()> {
        for (number, (mounted, todo)) in mounts.0.iter().zip(&plans.0).enumerate() {
            let area = images[to].areas[number].area.clone();
            let index = self.index(&area);
            let recorded = &images[to].areas[number];
            let trust = self.known[index].inodes.trust();
            // What is as it was is in the recorded tree only, what is of lower layers in the wanted one.
            let nodes = shown(&todo.wanted.nodes);
            let find = |number| {
                let old = recorded.index().shown(number);
                let old = old.map(|node| &recorded.tree.nodes[node]);
                old.chain(nodes.get(&number).into_iter().flatten().copied())
            };
            let exposed = exposed(uses, &area, trust, find);
            let read = |ino: u64| match exposed.contains(&ino) {
                true => Read::Exposed,
                false => Read::Stopped,
            };
            let known = &mut self.known[index].inodes;
            for (meta, content) in &todo.recognized {
                let (meta, ino) = (Arc::clone(meta), meta.stat.ino);
                known.learn(meta, content.clone(), read(ino));
            }
            exposed.iter().for_each(|ino| known.expose(*ino));
            let mut rebound = rebound(mounted, recorded, &exposed)?;
            rebound.extend(visited(mounted, &recorded.tree, directories)?);
            let after = todo.plan.after.iter();
            let after = after.map(|(node, path)| (&todo.wanted.nodes[*node], path.clone()));
            let mut after: Vec<(&Node, PathBuf)> = after.collect();
            // The deepest first: what is done to a name changes the times of its directory only.
            for (node, path) in rebound {
                let (parent, name) = split(&path);
                let directory = descend(mounted.root.as_fd(), parent);
                directory
                    .and_then(|directory| {
                        let name = if name.is_empty() {
                            OsStr::new(".")
                        } else {
                            name
                        };
                        set_times(directory.as_fd(), name, &node.meta)
                    })
                    .map_err(mounted.error("set times of", &path))?;
                after.push((node, path));
            }
            self.take(false);
            let mut changed = HashMap::new();
            for (was, path) in after {
                let now = mounted
                    .stat(&path)
                    .map_err(mounted.error("look at", &path))?;
                let meta = Arc::new(Meta {
                    stat: now,
                    ..Meta::clone(&was.meta)
                });
                if was.meta.stat.identity() != meta.stat.identity() && !was.of_lower {
                    changed.insert(was.meta.stat.identity(), meta.stat.clone());
                }
                let read = match exposed.contains(&was.meta.stat.ino) {
                    true => Read::Exposed,
                    false => read(meta.stat.ino),
                };
                let live = &mut self.known[index];
                if let Some((touched, device)) = self.touched.as_mut().zip(live.device) {
                    touched.looked_at(device, meta.stat.ino);
                }
                live.inodes.learn(meta, was.content.clone(), read);
            }
            let device = self.known[index].device;
            if let Some((touched, device)) = self.touched.as_mut().zip(device) {
                // What has been copied up stays, and is not among what was recorded.
                for directory in holding_lower(&todo.wanted) {
                    let now = changed.get(&directory.identity()).unwrap_or(directory);
                    touched.again(device, now.ino);
                }
            }
            images[to].areas[number].moment = self.moment(index);
            for image in images.iter_mut() {
                let of_area = image.areas.iter_mut().filter(|other| other.area == area);
                of_area.for_each(|other| other.renumber(&changed));
            }
        }
        Ok(())
    }

    /// Learns which files of a checkpoint are in use, and may change unseen.
    pub fn expose(&mut self, image: &Image, uses: &[Use]) {
        for area in &image.areas {
            let index = self.index(&area.area);
            let known = &mut self.known[index].inodes;
            let find = |number| {
                let nodes = area.index().shown(number);
                nodes.map(|node| &area.tree.nodes[node])
            };
            let exposed = exposed(uses, &area.area, known.trust(), find);
            exposed.iter().for_each(|ino| known.expose(*ino));
        }
    }
}

/// Recorded directories that have names of the lower layers.
fn holding_lower(wanted: &Tree) -> impl Iterator<Item = &Stat> {
    let holds = |node: &&Node| {
        let mut below = node.entries.values();
        !node.of_lower && below.any(|below| wanted.nodes[*below].of_lower)
    };
    let directories = wanted.nodes.iter().filter(holds);
    directories.map(|node| &node.meta.stat)
}
