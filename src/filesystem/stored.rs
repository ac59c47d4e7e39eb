//! The files of a checkpoint as an image on disk has them, and made of that again.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsString;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use nix::unistd::Pid;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use super::area::{Kind, Options};
use super::areas::discover;
use super::image::{AreaImage, Image};
use super::meta::{Meta, Stat};
use super::mounted::Mounted;
use super::session::Files;
use super::store::Kept;
use super::tree::{Content, Merged, Node, ROOT, Tree};
use super::{Error, Result};
use crate::outcome::Refusal;

/// Bytes of any value as text: each is the character of its number.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
struct Text(Vec<u8>);

impl Serialize for Text {
    fn serialize<S: Serializer>(&self, serializer: S) -> std::result::Result<S::Ok, S::Error> {
        let text: String = self.0.iter().map(|byte| char::from(*byte)).collect();
        serializer.serialize_str(&text)
    }
}

impl<'de> Deserialize<'de> for Text {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        let bytes: std::result::Result<_, _> = text.chars().map(u8::try_from).collect();
        bytes.map(Self).map_err(serde::de::Error::custom)
    }
}

/// What an area is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Sort {
    Overlay,
    Tmpfs,
    Volume,
}

impl Sort {
    fn of(kind: &Kind) -> Self {
        match kind {
            Kind::Overlay { .. } => Self::Overlay,
            Kind::Tmpfs => Self::Tmpfs,
            Kind::Volume { .. } => Self::Volume,
        }
    }
}

/// The files of an area; payload of a `FileArea` record, in JSON.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct StoredArea {
    sort: Sort,
    mount_point: Text,
    /// The number of contents, which are objects of their own: those that follow the area's.
    pub contents: u64,
    /// The first is the root.
    nodes: Vec<StoredNode>,
}

/// An inode.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct StoredNode {
    #[serde(flatten)]
    stat: Stat,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    target: Option<Text>,
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    xattrs: BTreeMap<Text, Text>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    content: Option<StoredContent>,
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    entries: BTreeMap<Text, usize>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    whiteouts: Option<Vec<Text>>,
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    of_lower: bool,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum StoredContent {
    /// The content of this number.
    Kept(u64),
    /// That of the file at this path in the lower layers.
    Lower(Text),
}

fn text(path: &Path) -> Text {
    Text(path.as_os_str().as_bytes().to_vec())
}

fn os(text: &Text) -> OsString {
    OsString::from_vec(text.0.clone())
}

impl AreaImage {
    /// As an image is to have it, with the contents in the order of their numbers.
    pub fn stored(&self) -> (StoredArea, Vec<Arc<Kept>>) {
        let mut contents: Vec<Arc<Kept>> = Vec::new();
        let mut numbers = BTreeMap::new();
        let mut number = |kept: &Arc<Kept>| {
            *numbers.entry(Arc::as_ptr(kept)).or_insert_with(|| {
                contents.push(Arc::clone(kept));
                contents.len() as u64 - 1
            })
        };
        let nodes = self.tree.nodes.iter().map(|node| StoredNode {
            stat: node.meta.stat.clone(),
            target: match node.meta.stat.is_symlink() {
                true => Some(Text(node.meta.target.clone())),
                false => None,
            },
            xattrs: node
                .meta
                .xattrs
                .iter()
                .map(|(name, value)| (Text(name.clone()), Text(value.clone())))
                .collect(),
            content: match &node.content {
                Content::Kept(kept) => Some(StoredContent::Kept(number(kept))),
                Content::Lower(path) => Some(StoredContent::Lower(text(path))),
                Content::Unknown => None,
            },
            entries: node
                .entries
                .iter()
                .map(|(name, node)| (Text(name.as_bytes().to_vec()), *node))
                .collect(),
            whiteouts: node.merged.as_ref().map(|merged| {
                let names = merged.whiteouts.iter();
                names.map(|name| Text(name.as_bytes().to_vec())).collect()
            }),
            of_lower: node.of_lower,
        });
        let nodes = nodes.collect();
        let area = StoredArea {
            sort: Sort::of(&self.area.kind),
            mount_point: text(&self.area.mount_point),
            contents: contents.len() as u64,
            nodes,
        };
        (area, contents)
    }
}

impl StoredArea {
    /// Where it was mounted in the container.
    pub fn mount_point(&self) -> PathBuf {
        os(&self.mount_point).into()
    }

    /// How many files and directories there are.
    pub fn files(&self) -> usize {
        self.nodes.len()
    }

    /// A path in the container that leads to an inode, given as the mount showed it, if that is in it.
    pub fn path_of(&self, inode: (u64, u64)) -> Option<PathBuf> {
        let wanted = self
            .nodes
            .iter()
            .position(|node| node.stat.shown == inode)?;
        let mut pending = vec![(ROOT, self.mount_point())];
        while let Some((directory, path)) = pending.pop() {
            for (name, &node) in &self.nodes[directory].entries {
                let path = path.join(os(name));
                if node == wanted {
                    return Some(path);
                }
                if self.nodes[node].stat.is_directory() {
                    pending.push((node, path));
                }
            }
        }
        None
    }

    /// Sizes of the contents, by their numbers.
    fn sizes(&self) -> BTreeMap<u64, u64> {
        let sized = self.nodes.iter().filter_map(|node| match node.content {
            Some(StoredContent::Kept(number)) => Some((number, node.stat.size)),
            _ => None,
        });
        sized.collect()
    }

    /// Whether it is a tree of files, and says what is wrong if not: names that lead elsewhere, above all.
    ///
    /// # Errors
    ///
    /// What is wrong.
    pub fn check(&self) -> std::result::Result<(), String> {
        let is_directory = |node: usize| {
            self.nodes
                .get(node)
                .is_some_and(|node| node.stat.is_directory())
        };
        if !is_directory(ROOT) {
            return Err("its root is no directory".into());
        }
        let mut seen = vec![false; self.nodes.len()];
        seen[ROOT] = true;
        let mut pending = vec![ROOT];
        while let Some(directory) = pending.pop() {
            for (name, &node) in &self.nodes[directory].entries {
                let plain = !matches!(&name.0[..], b"" | b"." | b"..")
                    && !name.0.contains(&b'/')
                    && !name.0.contains(&0);
                if !plain {
                    return Err(format!("{:?} is no name of a file", os(name)));
                }
                if node >= self.nodes.len() || is_directory(node) && seen[node] {
                    return Err(format!("{:?} leads to file {node}", os(name)));
                }
                if is_directory(node) {
                    pending.push(node);
                }
                seen[node] = true;
            }
        }
        match seen.iter().position(|seen| !seen) {
            Some(node) => Err(format!("file {node} has no name")),
            None => Ok(()),
        }
    }

    fn tree(&self, contents: &BTreeMap<u64, Arc<Kept>>) -> Option<Tree> {
        let node = |node: &StoredNode| {
            let content = match &node.content {
                None => Content::Unknown,
                Some(StoredContent::Lower(path)) => Content::Lower(os(path).into()),
                Some(StoredContent::Kept(number)) => {
                    Content::Kept(Arc::clone(contents.get(number)?))
                }
            };
            Some(Node {
                meta: Arc::new(Meta {
                    stat: node.stat.clone(),
                    target: node.target.clone().map_or_else(Vec::new, |text| text.0),
                    xattrs: node
                        .xattrs
                        .iter()
                        .map(|(name, value)| (name.0.clone(), value.0.clone()))
                        .collect(),
                }),
                content,
                entries: node
                    .entries
                    .iter()
                    .map(|(name, node)| (os(name), *node))
                    .collect(),
                merged: node.whiteouts.as_ref().map(|names| Merged {
                    whiteouts: names.iter().map(os).collect::<BTreeSet<_>>(),
                }),
                of_lower: node.of_lower,
            })
        };
        let nodes: Option<_> = self.nodes.iter().map(node).collect();
        Some(Tree { nodes: nodes? })
    }
}

/// Contents of files, named by the number of their area and their own in that.
pub trait Contents {
    /// What of one is no hole (offset and length), given its size.
    fn data(&self, name: (usize, u64), size: u64) -> Vec<(u64, u64)>;
    /// Reads one at an offset.
    ///
    /// # Errors
    ///
    /// It can't be read, or is damaged.
    fn read(&self, name: (usize, u64), offset: u64, buffer: &mut [u8]) -> std::io::Result<()>;
}

impl Files {
    /// Makes the files of a container that was just created what an image says, and returns them as a checkpoint has them.
    /// `root` is the container's init.
    ///
    /// # Errors
    ///
    /// Refused if the container has no such mount; or it can't be done, and then the container is not what it was.
    pub fn restore(
        &mut self,
        root: Pid,
        stored: &[&StoredArea],
        contents_of: &dyn Contents,
    ) -> Result<Image> {
        self.set_options(Options {
            include: !stored.is_empty(),
            volumes: stored
                .iter()
                .filter(|area| area.sort == Sort::Volume)
                .map(|area| area.mount_point())
                .collect(),
            ..self.options().clone()
        });
        let found = match stored.is_empty() {
            true => return Ok(Image::default()),
            false => discover(root, self.options())?,
        };
        let mut image = Image {
            areas: Vec::new(),
            left_out: found.left_out,
        };
        for (number, stored) in stored.iter().enumerate() {
            let is_it = |area: &&super::Area| {
                Sort::of(&area.kind) == stored.sort && area.mount_point == stored.mount_point()
            };
            let area = found.areas.iter().find(is_it);
            let missing = |remedy: &str| {
                Error::Refused(Refusal {
                    object: format!("the mount at {}", stored.mount_point().display()),
                    holder: "the container".into(),
                    remedy: remedy.into(),
                })
            };
            let remedy = match stored.sort {
                Sort::Overlay => "its files were in an overlay; restore it with --overlay",
                Sort::Tmpfs => "it was a tmpfs; mount one there",
                Sort::Volume => "it was a volume; mount one there",
            };
            let area = area.ok_or_else(|| missing(remedy))?.clone();
            let mounted = Mounted::open(root, &area)?;
            let mut contents = BTreeMap::new();
            for (content, size) in stored.sizes() {
                let name = (number, content);
                let data = contents_of.data(name, size);
                let kept = self.keep_read(&area, &mounted, size, data, &mut |offset, buffer| {
                    contents_of.read(name, offset, buffer)
                })?;
                contents.insert(content, kept);
            }
            let tree = stored.tree(&contents);
            let tree = tree.ok_or_else(|| missing("the image lacks contents of its files"))?;
            image.areas.push(AreaImage::new(area, tree, Vec::new()));
        }
        let mounts = self.open(root, &image)?;
        let plans = self.plan(&mounts, &image, &[])?;
        self.execute(&mounts, &image, &plans)?;
        self.settle(&mounts, &mut [&mut image], 0, &plans, &[], &[])?;
        Ok(image)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn any_bytes_are_text_and_back() {
        let all = Text((0..=255).collect());
        let written = serde_json::to_string(&all).unwrap();
        assert_eq!(serde_json::from_str::<Text>(&written).unwrap(), all);
        assert!(serde_json::from_str::<Text>("\"\u{100}\"").is_err());
    }

    /// Type and entries of each file.
    type Nodes<'a> = &'a [(u32, &'a [(&'a str, usize)])];

    fn area(nodes: Nodes<'_>) -> StoredArea {
        let node = |(mode, entries): &(u32, &[(&str, usize)])| StoredNode {
            stat: Stat {
                mode: *mode,
                ..Stat::default()
            },
            target: None,
            xattrs: BTreeMap::new(),
            content: None,
            entries: entries
                .iter()
                .map(|(name, node)| (Text(name.as_bytes().to_vec()), *node))
                .collect(),
            whiteouts: None,
            of_lower: false,
        };
        StoredArea {
            sort: Sort::Tmpfs,
            mount_point: Text(b"/tmp".to_vec()),
            contents: 0,
            nodes: nodes.iter().map(node).collect(),
        }
    }

    #[test]
    fn what_is_no_tree_is_told() {
        let (directory, file) = (libc::S_IFDIR, libc::S_IFREG);
        let good: Nodes<'_> = &[
            (directory, &[("a", 1), ("b", 2), ("c", 1)]),
            (file, &[]),
            (directory, &[]),
        ];
        assert_eq!(area(good).check(), Ok(()));
        let bad: [Nodes<'_>; 7] = [
            &[],
            &[(file, &[])],
            &[(directory, &[("..", 1)]), (file, &[])],
            &[(directory, &[("a/b", 1)]), (file, &[])],
            &[(directory, &[("a", 7)])],
            &[(directory, &[("a", 0)])],
            &[(directory, &[]), (file, &[])],
        ];
        for nodes in bad {
            assert!(area(nodes).check().is_err(), "{nodes:?}");
        }
    }
}
