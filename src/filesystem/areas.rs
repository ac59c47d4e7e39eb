//! Which of a tree's mounts hold files that go back with it.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Component, Path, PathBuf};

use nix::unistd::Pid;

use super::layers::{self, in_tree};
use super::{Area, Error, Found, Kind, LeftOut, Options, Result};
use crate::kernel::mountinfo::{self, Mount, visible};
use crate::kernel::procfs;
use crate::outcome::Refusal;

/// File systems that show the kernel's own state: never files of a container's.
const OF_THE_KERNEL: &[&str] = &[
    "autofs",
    "binfmt_misc",
    "bpf",
    "cgroup",
    "cgroup2",
    "configfs",
    "debugfs",
    "devpts",
    "devtmpfs",
    "efivarfs",
    "fusectl",
    "mqueue",
    "nsfs",
    "proc",
    "pstore",
    "rpc_pipefs",
    "securityfs",
    "selinuxfs",
    "sysfs",
    "tracefs",
];

/// File systems whose files others change as well, behind our back.
const OF_OTHERS: &[&str] = &[
    "9p", "afs", "ceph", "cifs", "fuse", "nfs", "nfs4", "smb3", "virtiofs",
];

/// What is to be done with a mount.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Verdict {
    Overlay,
    Tmpfs,
    Volume,
    LeftOut(String),
    /// The root directory is writable, and there is no telling what was written.
    PlainRoot,
    /// Not worth a word: state of the kernel's.
    Nothing,
}

/// Finds what of the mounts of the tree below the process `root` goes back with it.
///
/// # Errors
///
/// Refused: the root directory is a plain one that can be written; a layer of an overlay is not to be found; a volume
/// was named that is no mount of the tree or can't be kept.
pub fn discover(root: Pid, options: &Options) -> Result<Found> {
    let read = |mounts: std::io::Result<_>, path: PathBuf| {
        mounts.map_err(|error| Error::File {
            what: "reading",
            path,
            error,
        })
    };
    if !options.include {
        return Ok(Found::default());
    }
    if is_of_the_host(root)? {
        return of_the_host(root, options);
    }
    let theirs = read(mountinfo::read(root), procfs::path(root, "mountinfo"))?;
    let ours = read(mountinfo::read_own(), "/proc/self/mountinfo".into())?;
    let is_directory = |path: &Path| in_tree(root, path).is_dir();
    let judged = judge(&visible(&theirs), &ours, options, &is_directory);
    for volume in &options.volumes {
        if !judged.iter().any(|(mount, _)| mount.mount_point == *volume) {
            return Err(no_mount(root, volume));
        }
    }
    let mut found = Found::default();
    for (mount, verdict) in &judged {
        let kind = match verdict {
            Verdict::Overlay => {
                let (upper, lowers) = layers::find(root, mount, &theirs, &ours)
                    .map_err(|object| lacking(root, object))?;
                Kind::Overlay { upper, lowers }
            }
            Verdict::Tmpfs => Kind::Tmpfs,
            Verdict::Volume => Kind::Volume {
                source: layers::source(root, mount, &ours).ok_or_else(|| no_source(root, mount))?,
            },
            Verdict::LeftOut(why) => {
                found.left_out.push(LeftOut {
                    mount_point: mount.mount_point.clone(),
                    why: why.clone(),
                });
                continue;
            }
            Verdict::PlainRoot => return Err(plain_root(root)),
            Verdict::Nothing => continue,
        };
        found.areas.push(Area {
            kind,
            mount_point: mount.mount_point.clone(),
            mount_id: mount.id,
            device: mount.device,
            file_system: mount.file_system.clone(),
            read_only: mount.read_only,
        });
    }
    mounts_of_others(root, &theirs, &mut found);
    Ok(found)
}

/// Whether the tree sees the host's files: it is in our mount namespace or that of the machine's first process, or has
/// the same root directory (a service with a `/tmp` of its own).
fn is_of_the_host(root: Pid) -> Result<bool> {
    let namespace = |pid: &str| fs::read_link(format!("/proc/{pid}/ns/mnt"));
    let path = procfs::path(root, "ns/mnt");
    let failed = |path: PathBuf| {
        move |error| Error::File {
            what: "looking at",
            path,
            error,
        }
    };
    let theirs = namespace(&root.to_string()).map_err(failed(path))?;
    if [namespace("self"), namespace("1")]
        .into_iter()
        .flatten()
        .any(|other| other == theirs)
    {
        return Ok(true);
    }
    let path = procfs::path(root, "root/.");
    let there = fs::metadata(&path).map_err(failed(path))?;
    let here = fs::metadata("/").map_err(failed("/".into()))?;
    Ok((there.dev(), there.ino()) == (here.dev(), here.ino()))
}

fn of_the_host(root: Pid, options: &Options) -> Result<Found> {
    if let Some(volume) = options.volumes.first() {
        return Err(no_mount(root, volume));
    }
    Ok(Found {
        areas: Vec::new(),
        left_out: vec![LeftOut {
            mount_point: "/".into(),
            why: "the processes see the host's files, which are not theirs alone".into(),
        }],
    })
}

/// Decides for each mount that can be seen; pure but for what `is_directory` says of a path of the tree's.
fn judge<'a>(
    theirs: &[&'a Mount],
    ours: &[Mount],
    options: &Options,
    is_directory: &dyn Fn(&Path) -> bool,
) -> Vec<(&'a Mount, Verdict)> {
    let mut judged: Vec<(&Mount, Verdict)> = theirs
        .iter()
        .map(|mount| (*mount, verdict(mount, ours, options, is_directory)))
        .collect();
    // Where the same files are mounted more than once, one mount stands for all, the widest and shortest.
    let areas: Vec<&Mount> = judged
        .iter()
        .filter(|(_, verdict)| {
            matches!(verdict, Verdict::Overlay | Verdict::Tmpfs | Verdict::Volume)
        })
        .map(|(mount, _)| *mount)
        .collect();
    let key = |mount: &Mount| {
        (
            mount.root.components().count(),
            mount.mount_point.as_os_str().len(),
            mount.id,
        )
    };
    for (mount, verdict) in &mut judged {
        let is_contained = areas.iter().any(|area| {
            area.id != mount.id
                && area.device == mount.device
                && mount.root.starts_with(&area.root)
                && key(area) < key(mount)
        });
        if is_contained {
            *verdict = Verdict::Nothing;
        }
    }
    judged
}

fn verdict(
    mount: &Mount,
    ours: &[Mount],
    options: &Options,
    is_directory: &dyn Fn(&Path) -> bool,
) -> Verdict {
    let place = &mount.mount_point;
    let is_whole = mount.root == Path::new("/");
    let kind = mount.file_system.as_str();
    let is_asked_for = options.volumes.contains(place);
    let is_of = |kinds: &[&str]| kinds.contains(&kind.split('.').next().unwrap_or(kind));
    if OF_THE_KERNEL.contains(&kind) || ["/proc", "/sys"].iter().any(|top| place.starts_with(top)) {
        return Verdict::Nothing;
    }
    let left_out = |why: String| Verdict::LeftOut(why);
    if mount.read_only || (kind == "overlay" && mount.option("upperdir").next().is_none()) {
        return left_out("read-only".into());
    }
    if !is_directory(place) {
        return left_out("a single file of the host's".into());
    }
    let shown_by_us: Vec<PathBuf> = layers::places(mount, ours);
    if kind == "overlay" && is_whole {
        return Verdict::Overlay;
    }
    if kind == "tmpfs" && is_whole && shown_by_us.iter().all(|place| is_of_an_engine(place)) {
        return Verdict::Tmpfs;
    }
    if is_of(OF_OTHERS) {
        return left_out(format!("{kind}: others can change these files"));
    }
    if kind == "hugetlbfs" || kind == "ramfs" {
        return left_out(format!("{kind}: not supported"));
    }
    let mut names = shown_by_us.iter().chain([&mount.root]);
    if is_asked_for || names.any(|path| is_engine_volume(path)) {
        return Verdict::Volume;
    }
    if place == Path::new("/") {
        return Verdict::PlainRoot;
    }
    left_out(format!(
        "mounted from the host; --volume {} takes it in",
        place.display()
    ))
}

/// Whether a path is one of a volume of podman's or Docker's: `…/volumes/NAME/_data`, or below that.
fn is_engine_volume(path: &Path) -> bool {
    let names: Vec<Component<'_>> = path.components().collect();
    names
        .windows(3)
        .any(|names| names[0].as_os_str() == "volumes" && names[2].as_os_str() == "_data")
}

/// Whether a mount point of the host's is one at which an engine keeps a container's shared memory: podman, Docker,
/// containerd's CRI.
fn is_of_an_engine(place: &Path) -> bool {
    let names: Vec<&str> = place.iter().filter_map(|name| name.to_str()).collect();
    const OF_CONTAINERS: [&str; 3] = ["overlay-containers", "vfs-containers", "btrfs-containers"];
    matches!(
        names.as_slice(),
        [.., "containers", _, "mounts", "shm"] | [.., "sandboxes", _, "shm"]
    ) || matches!(names.as_slice(), [.., of, _, "userdata", "shm"] if OF_CONTAINERS.contains(of))
}

/// Adds what processes of the tree see that have a mount namespace of their own, if it is not in one of the areas.
fn mounts_of_others(root: Pid, theirs: &[Mount], found: &mut Found) {
    let namespace = |pid: Pid| fs::read_link(procfs::path(pid, "ns/mnt")).ok();
    let mut seen = vec![namespace(root)];
    for pid in descendants(root) {
        let own = namespace(pid);
        // Gone meanwhile, or a zombie.
        if own.is_none() || seen.contains(&own) {
            continue;
        }
        seen.push(own);
        let Ok(mounts) = mountinfo::read(pid) else {
            continue;
        };
        for mount in visible(&mounts) {
            let is_known = theirs.iter().any(|known| known.device == mount.device);
            if !is_known && !mount.read_only && !OF_THE_KERNEL.contains(&mount.file_system.as_str())
            {
                found.left_out.push(LeftOut {
                    mount_point: mount.mount_point.clone(),
                    why: format!(
                        "only in the mount namespace of pid {pid} ({})",
                        procfs::comm(pid)
                    ),
                });
            }
        }
    }
}

fn descendants(root: Pid) -> Vec<Pid> {
    let mut found = Vec::new();
    let mut pending = vec![root];
    while let Some(pid) = pending.pop() {
        for tid in procfs::tasks(pid).unwrap_or_default() {
            let children = procfs::children(pid, tid).unwrap_or_default();
            pending.extend(&children);
            found.extend(children);
        }
    }
    found
}

fn holder(root: Pid) -> String {
    format!("pid {root} ({})", procfs::comm(root))
}

fn plain_root(root: Pid) -> Error {
    Refusal {
        object: "root directory: a plain one, in which nothing tells what the container has written"
            .into(),
        holder: holder(root),
        remedy: "create it with --overlay, which gives it a layer of its own; or --volume / takes in all there is; or \
            --no-files takes the processes alone"
            .into(),
    }
    .into()
}

fn lacking(root: Pid, object: String) -> Error {
    Refusal {
        object,
        holder: holder(root),
        remedy:
            "run snapback where that directory is mounted; or --no-files takes the processes alone"
                .into(),
    }
    .into()
}

fn no_mount(root: Pid, volume: &Path) -> Error {
    Refusal {
        object: format!("--volume {}: no mount of the container", volume.display()),
        holder: holder(root),
        remedy:
            "give the path at which it is mounted in the container (/proc/PID/mountinfo has them)"
                .into(),
    }
    .into()
}

fn no_source(root: Pid, mount: &Mount) -> Error {
    Refusal {
        object: format!(
            "volume {}: its directory {} of the host's is not mounted where snapback runs",
            mount.mount_point.display(),
            mount.root.display()
        ),
        holder: holder(root),
        remedy: "run snapback where it is mounted; or --no-files takes the processes alone".into(),
    }
    .into()
}

#[cfg(test)]
#[path = "areas_tests.rs"]
mod tests;
