//! Where the directories behind a mount of the tree's are as we see them: in the keeper's mount namespace.
//!
//! `mountinfo` has them as they were given to mount(2): perhaps escaped, perhaps relative to a directory that the
//! engine was in at the time. So each is looked for, and what is found is compared with what the mount shows.

use std::ffi::{OsStr, OsString};
use std::fs::{self, Metadata};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use nix::unistd::Pid;

use crate::kernel::mountinfo::{Mount, visible};
use crate::kernel::procfs;

/// Where engines are when they mount an overlay whose options would be too long with absolute paths: podman, Docker,
/// containerd.
const WHERE_ENGINES_MOUNT: &[&str] = &[
    "/var/lib/containers/storage/overlay",
    "/var/lib/docker/overlay2",
    "/var/lib/containerd/io.containerd.snapshotter.v1.overlayfs/snapshots",
];

/// How many times what is found is compared with what is shown: the container may change it meanwhile.
const TRIES: usize = 100;

/// How many entries of a lower directory are compared at most.
const SAMPLES: usize = 64;

/// A path of the tree's as we can open it.
pub(super) fn in_tree(root: Pid, path: &Path) -> PathBuf {
    let below = path.strip_prefix("/").unwrap_or(path);
    // `.` at the end: the mount itself, not the link.
    procfs::path(root, "root").join(below).join(".")
}

/// The paths at which our mount namespace shows what a mount shows.
pub(super) fn places(mount: &Mount, ours: &[Mount]) -> Vec<PathBuf> {
    let shows = |own: &&Mount| own.device == mount.device && mount.root.starts_with(&own.root);
    let place = |own: &Mount| {
        let below = mount.root.strip_prefix(&own.root).unwrap_or(Path::new(""));
        match below.as_os_str().is_empty() {
            true => own.mount_point.clone(),
            false => own.mount_point.join(below),
        }
    };
    visible(ours).into_iter().filter(shows).map(place).collect()
}

/// The directory of ours that is mounted there.
pub(super) fn source(root: Pid, mount: &Mount, ours: &[Mount]) -> Option<PathBuf> {
    let shown = fs::metadata(in_tree(root, &mount.mount_point)).ok()?;
    let is_it = |place: &PathBuf| {
        fs::metadata(place).is_ok_and(|own| (own.dev(), own.ino()) == (shown.dev(), shown.ino()))
    };
    places(mount, ours).into_iter().find(is_it)
}

/// The upper and the lower directories of an overlay, the uppermost first, or what is not to be found.
pub(super) fn find(
    root: Pid,
    mount: &Mount,
    theirs: &[Mount],
    ours: &[Mount],
) -> Result<(PathBuf, Vec<PathBuf>), String> {
    let merged = in_tree(root, &mount.mount_point);
    let bases = bases(mount, ours);
    // Of what is mounted on an entry the overlay's own is not seen.
    let covered: Vec<&Path> = theirs
        .iter()
        .map(|other| other.mount_point.as_path())
        .collect();
    let is_covered = |name: &OsStr| covered.contains(&mount.mount_point.join(name).as_path());
    let lacking = |what: &str, path: &OsStr| {
        format!(
            "{what} directory {} of the overlay on {}: not to be found where snapback runs",
            path.to_string_lossy(),
            mount.mount_point.display()
        )
    };
    let raw = mount.option("upperdir").next().unwrap_or_default();
    let upper = candidates(raw, &bases)
        .into_iter()
        .find(|candidate| is_upper(candidate, &merged))
        .ok_or_else(|| lacking("upper", raw))?;
    let mut lowers = Vec::new();
    for raw in lower_names(mount) {
        let above: Vec<&Path> = [upper.as_path()]
            .into_iter()
            .chain(lowers.iter().map(PathBuf::as_path))
            .collect();
        let lower = candidates(&raw, &bases)
            .into_iter()
            .find(|candidate| is_lower(candidate, &above, &merged, &is_covered))
            .ok_or_else(|| lacking("lower", &raw))?;
        lowers.push(lower);
    }
    Ok((upper, lowers))
}

/// The lower directories as they were given, still escaped: `lowerdir=A:B`, or `lowerdir+=` for each (since Linux 6.5).
/// What follows an empty one (`A::B`) has file contents only, which those above it lead to (`metacopy`).
fn lower_names(mount: &Mount) -> Vec<OsString> {
    let mut names: Vec<OsString> = Vec::new();
    for list in mount.option("lowerdir") {
        let mut name = Vec::new();
        let mut bytes = list.as_bytes().iter();
        let mut parts = Vec::new();
        while let Some(&byte) = bytes.next() {
            match byte {
                b'\\' => {
                    name.push(byte);
                    name.extend(bytes.next());
                }
                b':' => parts.push(OsString::from_vec(std::mem::take(&mut name))),
                _ => name.push(byte),
            }
        }
        parts.push(OsString::from_vec(name));
        names.extend(parts.into_iter().take_while(|part| !part.is_empty()));
    }
    names.extend(mount.option("lowerdir+").map(OsStr::to_owned));
    names
}

/// Directories that a relative path may start from.
fn bases(mount: &Mount, ours: &[Mount]) -> Vec<PathBuf> {
    let absolute = ["upperdir", "workdir"]
        .into_iter()
        .flat_map(|name| mount.option(name))
        .map(PathBuf::from)
        .filter(|path| path.is_absolute());
    // Engines mount it for themselves as well: `…/overlay/HASH/merged`.
    let engines = ours
        .iter()
        .filter(|own| own.device == mount.device)
        .map(|own| own.mount_point.clone());
    let mut bases: Vec<PathBuf> = WHERE_ENGINES_MOUNT.iter().map(PathBuf::from).collect();
    for path in absolute.chain(engines) {
        for above in path.ancestors().skip(1) {
            if !bases.iter().any(|base| base == above) {
                bases.push(above.to_owned());
            }
        }
    }
    bases
}

/// Directories that a name among the options may mean.
fn candidates(raw: &OsStr, bases: &[PathBuf]) -> Vec<PathBuf> {
    let mut names = vec![PathBuf::from(unescape(raw))];
    // The newer mount interface takes names as they are.
    if names[0].as_os_str() != raw {
        names.push(raw.into());
    }
    let places = names.iter().flat_map(|name| match name.is_absolute() {
        true => vec![name.clone()],
        false => bases.iter().map(|base| base.join(name)).collect(),
    });
    places.filter(|place| place.is_dir()).collect()
}

/// Takes one backslash away, as the kernel does with the options of an overlay.
fn unescape(raw: &OsStr) -> OsString {
    let mut plain = Vec::with_capacity(raw.len());
    let mut bytes = raw.as_bytes().iter();
    while let Some(&byte) = bytes.next() {
        match byte {
            b'\\' => plain.extend(bytes.next()),
            _ => plain.push(byte),
        }
    }
    OsString::from_vec(plain)
}

/// What an overlay passes on of a layer's file: all but numbers of device, inode and links.
fn passed_on(metadata: &Metadata) -> impl PartialEq + use<> {
    (
        (metadata.mode(), metadata.uid(), metadata.gid()),
        (metadata.mtime(), metadata.mtime_nsec()),
        (metadata.ctime(), metadata.ctime_nsec()),
    )
}

/// Whether an overlay's root directory is this one: it has the attributes of the uppermost, to the nanosecond.
fn is_upper(candidate: &Path, merged: &Path) -> bool {
    (0..TRIES).any(|_| match (fs::metadata(candidate), fs::metadata(merged)) {
        (Ok(own), Ok(shown)) => passed_on(&own) == passed_on(&shown),
        _ => false,
    })
}

/// Whether an overlay shows what is in this directory and in none `above` it. One in which nothing is to be seen can't
/// be told from another, nor is that needed.
fn is_lower(
    candidate: &Path,
    above: &[&Path],
    merged: &Path,
    is_covered: &dyn Fn(&OsStr) -> bool,
) -> bool {
    let Ok(entries) = fs::read_dir(candidate) else {
        return false;
    };
    let is_hidden = |name: &OsStr| {
        let mut layers = above.iter();
        is_covered(name) || layers.any(|layer| layer.join(name).symlink_metadata().is_ok())
    };
    let matches = |name: &OsStr| {
        let own = candidate.join(name).symlink_metadata();
        let shown = merged.join(name).symlink_metadata();
        match (own, shown) {
            (Ok(own), Ok(shown)) => passed_on(&own) == passed_on(&shown),
            // A whiteout of this layer's own.
            (Ok(own), Err(_)) => own.rdev() == 0 && own.mode() & libc::S_IFMT == libc::S_IFCHR,
            _ => false,
        }
    };
    let names = entries.flatten().map(|entry| entry.file_name());
    names
        .filter(|name| !is_hidden(name))
        .take(SAMPLES)
        // A change meanwhile copies it up: then it is hidden by the upper one.
        .all(|name| matches(&name) || is_hidden(&name))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernel::mountinfo::parse;

    #[test]
    fn names_of_layers_are_taken_apart() {
        let lowers = |options: &str| {
            let line = format!("1 0 0:1 / / rw - overlay overlay rw,{options}\n");
            lower_names(&parse(line.as_bytes()).unwrap()[0])
        };
        assert_eq!(lowers("lowerdir=/a:/b\\134:c:l/D"), ["/a", "/b\\:c", "l/D"]);
        assert_eq!(lowers("lowerdir=/a:/b::/data"), ["/a", "/b"]);
        assert_eq!(
            lowers("lowerdir+=/a,lowerdir+=/b:c,datadir+=/d"),
            ["/a", "/b:c"]
        );
        assert_eq!(unescape(OsStr::new("/b\\:c\\\\d\\,")), "/b:c\\d,");
    }

    #[test]
    fn relative_names_start_where_the_engine_was() {
        let place = tempfile::tempdir().unwrap();
        let overlay = place.path().join("overlay");
        fs::create_dir_all(overlay.join("l/LINK")).unwrap();
        let line = format!(
            "9 1 0:9 / / rw - overlay overlay rw,lowerdir=l/LINK,upperdir={0}/HASH/diff,workdir={0}/HASH/work\n",
            overlay.display()
        );
        let mount = &parse(line.as_bytes()).unwrap()[0];
        let found = candidates(OsStr::new("l/LINK"), &bases(mount, &[]));
        assert_eq!(found, [overlay.join("l/LINK")]);
    }
}
