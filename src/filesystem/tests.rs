//! Areas in a mount namespace of their own, changed at random, and compared with what they were by other code.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::{OsStr, OsString};
use std::fs::{self, File, OpenOptions};
use std::io::{BufRead, BufReader, Write};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use nix::sys::stat::{Mode, SFlag, mknod};
use nix::unistd::Pid;

use super::session::tests_only::{files_of, full_plan, without_journal};
use super::*;
use crate::kernel::mountinfo;

/// A process with mounts of its own.
struct Place {
    child: Child,
    /// Where we see the mount.
    seen: PathBuf,
    area: Area,
    directory: tempfile::TempDir,
    sort: Sort,
}

#[derive(Debug, Clone, Copy, PartialEq)]
enum Sort {
    Tmpfs,
    Overlay,
    Volume,
    /// An overlay whose upper layer is on a file system that can share blocks.
    Reflink,
}

impl Place {
    fn new(sort: Sort) -> Self {
        let directory = tempfile::tempdir_in("/var/tmp").unwrap();
        let at = directory.path().join("at");
        for name in ["at", "upper", "work", "lower1", "lower2", "source"] {
            fs::create_dir(directory.path().join(name)).unwrap();
        }
        if matches!(sort, Sort::Overlay | Sort::Reflink) {
            fill_lowers(directory.path());
        }
        if sort == Sort::Reflink {
            mount_xfs(directory.path());
        }
        let path = directory.path().display();
        let upper = match sort {
            Sort::Reflink => directory.path().join("xfs"),
            _ => directory.path().to_owned(),
        };
        let upper = upper.display();
        let mount = match sort {
            Sort::Tmpfs => format!("mount -t tmpfs none {path}/at"),
            Sort::Overlay | Sort::Reflink => format!(
                "mount -t overlay none -o lowerdir={path}/lower1:{path}/lower2,upperdir={upper}/upper,workdir={upper}/work {path}/at"
            ),
            Sort::Volume => format!("mount --bind {path}/source {path}/at"),
        };
        let mut child = Command::new("unshare")
            .args(["-m", "sh", "-c"])
            .arg(format!("{mount} && echo ready && exec sleep infinity"))
            .stdout(Stdio::piped())
            .spawn()
            .expect("unshare");
        let mut line = String::new();
        let stdout = child.stdout.take().unwrap();
        BufReader::new(stdout).read_line(&mut line).unwrap();
        assert_eq!(line, "ready\n", "mounting");
        let pid = child.id() as i32;
        let mounts = mountinfo::read(Pid::from_raw(pid)).unwrap();
        let mount = mounts
            .into_iter()
            .find(|mount| mount.mount_point == at)
            .expect("the mount");
        let kind = match sort {
            Sort::Tmpfs => Kind::Tmpfs,
            Sort::Overlay | Sort::Reflink => Kind::Overlay {
                upper: Path::new(&upper.to_string()).join("upper"),
                lowers: vec![
                    directory.path().join("lower1"),
                    directory.path().join("lower2"),
                ],
            },
            Sort::Volume => Kind::Volume {
                source: directory.path().join("source"),
            },
        };
        let area = Area {
            kind,
            mount_id: mount.id,
            device: mount.device,
            file_system: mount.file_system,
            read_only: false,
            mount_point: at.clone(),
        };
        let seen = PathBuf::from(format!("/proc/{pid}/root{}", at.display()));
        Self {
            child,
            seen,
            area,
            directory,
            sort,
        }
    }

    fn pid(&self) -> Pid {
        Pid::from_raw(self.child.id() as i32)
    }

    fn files(&self) -> Files {
        Files::new(Options {
            store: self.directory.path().join("store"),
            ..Options::default()
        })
    }

    fn checkpoint(&self, files: &mut Files) -> Image {
        self.checkpoint_after(files, &[], 1, &mut || {})
    }

    /// Content is kept early some times; each time things happen meanwhile.
    fn checkpoint_after(
        &self,
        files: &mut Files,
        others: &[&Image],
        early: usize,
        meanwhile: &mut dyn FnMut(),
    ) -> Image {
        let found = Found {
            areas: vec![self.area.clone()],
            left_out: Vec::new(),
        };
        let mut prepared = files_of(files, self.pid(), found, others).unwrap();
        files.is_much(&prepared).unwrap();
        meanwhile();
        for _ in 0..early {
            files.keep_early(self.pid(), &mut prepared).unwrap();
            meanwhile();
        }
        let image = files.capture(prepared, &[]).unwrap();
        assert_no_inode_twice(&image);
        image
    }

    fn rollback(&self, files: &mut Files, images: &mut [&mut Image], to: usize) -> Put {
        let mounts = files.open(self.pid(), images[to]).unwrap();
        let plans = files.plan(&mounts, images[to], &[]).unwrap();
        // Leaving out what is the same changes nothing.
        let [full, cut] = full_plan(files, &mounts, images[to], &plans).unwrap();
        let only = |one: &BTreeSet<String>, other: &BTreeSet<String>| {
            let only = one.difference(other);
            only.cloned().collect::<Vec<_>>()
        };
        let (in_full, in_cut) = (only(&full, &cut), only(&cut, &full));
        assert!(
            full == cut,
            "only in the full plan {in_full:#?}, in the cut one {in_cut:#?}"
        );
        let put = files.execute(&mounts, images[to], &plans).unwrap();
        files.settle(&mounts, images, to, &plans, &[], &[]).unwrap();
        files.rest();
        let differences = files.verify(&mounts, images[to]).unwrap();
        assert!(differences.is_empty(), "{differences:?}");
        put
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        let xfs = self.directory.path().join("xfs");
        if xfs.exists() {
            let _ = Command::new("umount").arg("--lazy").arg(xfs).status();
        }
    }
}

/// An image of XFS in a file, mounted at `xfs`.
fn mount_xfs(directory: &Path) {
    let image = directory.join("image");
    File::create(&image).unwrap().set_len(320 << 20).unwrap();
    let xfs = directory.join("xfs");
    fs::create_dir(&xfs).unwrap();
    let run = |command: &mut Command| {
        let done = command.output().expect("a command of the system");
        assert!(done.status.success(), "{done:?}");
    };
    run(Command::new("/usr/sbin/mkfs.xfs").arg("-q").arg(&image));
    run(Command::new("mount")
        .arg("-o")
        .arg("loop")
        .arg(&image)
        .arg(&xfs));
    for name in ["upper", "work"] {
        fs::create_dir(xfs.join(name)).unwrap();
    }
}

fn fill_lowers(directory: &Path) {
    for (layer, names) in [("lower1", ["a", "b", "c"]), ("lower2", ["b", "c", "d"])] {
        let layer = directory.join(layer);
        for name in names {
            let below = layer.join(format!("dir-{name}"));
            fs::create_dir(&below).unwrap();
            for file in ["x", "y"] {
                fs::write(below.join(file), format!("{name} {file} of {layer:?}")).unwrap();
            }
            let deep = below.join("deep");
            fs::create_dir(&deep).unwrap();
            fs::write(deep.join("z"), vec![7; 10_000]).unwrap();
            fs::write(layer.join(name), format!("{name} of {layer:?}")).unwrap();
        }
        symlink("a", layer.join("link")).unwrap();
    }
}

/// An inode is one node, whatever names it has.
fn assert_no_inode_twice(image: &Image) {
    let nodes = &image.areas[0].tree.nodes;
    let numbers: BTreeSet<u64> = nodes.iter().map(|node| node.meta.stat.ino).collect();
    assert_eq!(numbers.len(), nodes.len());
}

/// All there is to know of a name.
#[derive(Debug, Clone, PartialEq)]
struct Seen {
    mode: u32,
    owner: (u32, u32),
    rdev: u64,
    mtime: (i64, i64),
    target: OsString,
    content: Vec<u8>,
    xattrs: BTreeMap<Vec<u8>, Vec<u8>>,
    /// The first name of the same inode, of what is in one layer.
    same_as: Option<PathBuf>,
}

fn see_all(root: &Path) -> BTreeMap<PathBuf, Seen> {
    let mut all = BTreeMap::new();
    let mut pending = vec![PathBuf::new()];
    let mut inodes: BTreeMap<u64, PathBuf> = BTreeMap::new();
    while let Some(path) = pending.pop() {
        let full = root.join(&path);
        let meta = fs::symlink_metadata(&full).unwrap();
        let kind = meta.mode() & libc::S_IFMT;
        let content = match kind {
            libc::S_IFREG => fs::read(&full).unwrap(),
            _ => Vec::new(),
        };
        let mut names = vec![0; 4096];
        let length = rustix::fs::llistxattr(&full, &mut names[..]).unwrap();
        let mut xattrs = BTreeMap::new();
        for name in names[..length]
            .split(|&byte| byte == 0)
            .filter(|name| !name.is_empty())
        {
            let mut value = vec![0; 4096];
            let length =
                rustix::fs::lgetxattr(&full, OsStr::from_bytes(name), &mut value[..]).unwrap();
            xattrs.insert(name.to_vec(), value[..length].to_vec());
        }
        let same_as = (meta.nlink() > 1 && kind != libc::S_IFDIR)
            .then(|| inodes.entry(meta.ino()).or_insert(path.clone()).clone());
        let seen = Seen {
            mode: meta.mode(),
            owner: (meta.uid(), meta.gid()),
            rdev: meta.rdev(),
            mtime: (meta.mtime(), meta.mtime_nsec()),
            target: fs::read_link(&full)
                .map(PathBuf::into_os_string)
                .unwrap_or_default(),
            content,
            xattrs,
            same_as,
        };
        all.insert(path.clone(), seen);
        if kind == libc::S_IFDIR {
            let mut names: Vec<OsString> = fs::read_dir(&full)
                .unwrap()
                .map(|entry| entry.unwrap().file_name())
                .collect();
            names.sort();
            names.reverse();
            pending.extend(names.into_iter().map(|name| path.join(name)));
        }
    }
    all
}

/// Of an overlay whose layers are on several file systems the kernel does not show names of one file to be so.
fn see(place: &Place) -> BTreeMap<PathBuf, Seen> {
    let mut all = see_all(&place.seen);
    if place.sort == Sort::Reflink {
        all.values_mut().for_each(|seen| seen.same_as = None);
    }
    all
}

#[track_caller]
fn assert_same(was: &BTreeMap<PathBuf, Seen>, is: &BTreeMap<PathBuf, Seen>) {
    for (path, seen) in was {
        match is.get(path) {
            None => panic!("{path:?} is missing"),
            Some(now) if now != seen => {
                let cut = |seen: &Seen| Seen {
                    content: seen.content[..seen.content.len().min(20)].to_vec(),
                    ..seen.clone()
                };
                panic!("{path:?}: {:?} became {:?}", cut(seen), cut(now));
            }
            Some(_) => {}
        }
    }
    for path in is.keys() {
        assert!(was.contains_key(path), "{path:?} is too much");
    }
}

/// Numbers that look random and are the same for the same seed.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        // Marsaglia's xorshift64*.
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 16
    }

    fn below(&mut self, end: usize) -> usize {
        (self.next() % end as u64) as usize
    }

    fn pick<'a, T>(&mut self, from: &'a [T]) -> Option<&'a T> {
        (!from.is_empty()).then(|| &from[self.below(from.len())])
    }
}

/// Does one thing to a tree of files; what fails, fails.
fn change(root: &Path, random: &mut Random) {
    let all: Vec<(PathBuf, bool)> = {
        let mut found = vec![(root.to_owned(), true)];
        let mut at = 0;
        while at < found.len() {
            if found[at].1 {
                let entries = fs::read_dir(&found[at].0).unwrap();
                let mut below: Vec<_> = entries
                    .map(|entry| entry.unwrap())
                    .map(|entry| (entry.path(), entry.file_type().unwrap().is_dir()))
                    .collect();
                below.sort();
                found.extend(below);
            }
            at += 1;
        }
        found
    };
    let directories: Vec<&PathBuf> = all
        .iter()
        .filter(|(_, is)| *is)
        .map(|(path, _)| path)
        .collect();
    let others: Vec<&PathBuf> = all.iter().skip(1).map(|(path, _)| path).collect();
    let files: Vec<&PathBuf> = all
        .iter()
        .filter(|(_, is)| !*is)
        .map(|(path, _)| path)
        .collect();
    let files: Vec<&PathBuf> = files
        .into_iter()
        .filter(|path| fs::symlink_metadata(path).unwrap().is_file())
        .collect();
    let names: [&[u8]; 7] = [
        b"one",
        b"two",
        b"three",
        b"a",
        b"dir-b",
        b"\xff\n odd",
        b"x",
    ];
    let place = |random: &mut Random| {
        let directory = random.pick(&directories).unwrap();
        directory.join(OsStr::from_bytes(names[random.below(names.len())]))
    };
    let new = place(random);
    let _ = match random.below(17) {
        0 => fs::create_dir(&new),
        1 | 2 => OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(0o600 | random.below(0o200) as u32)
            .open(&new)
            .and_then(|mut file| file.write_all(&vec![random.next() as u8; random.below(20_000)])),
        3 => match random.pick(&files) {
            Some(path) => OpenOptions::new().write(true).open(path).and_then(|file| {
                file.write_all_at(
                    &vec![random.next() as u8; 1 + random.below(9000)],
                    random.next() % 50_000,
                )
            }),
            None => Ok(()),
        },
        4 => match random.pick(&files) {
            Some(path) => OpenOptions::new()
                .write(true)
                .open(path)
                .and_then(|file| file.set_len(random.next() % 40_000)),
            None => Ok(()),
        },
        5 | 6 => match random.pick(&others) {
            Some(path) => fs::rename(path, &new),
            None => Ok(()),
        },
        7 => match random.pick(&files) {
            Some(path) => fs::hard_link(path, &new),
            None => Ok(()),
        },
        8 => match random.pick(&others) {
            Some(path) if path.is_symlink() || !path.is_dir() => fs::remove_file(path),
            Some(path) if random.below(3) == 0 => fs::remove_dir_all(path),
            Some(path) => fs::remove_dir(path),
            None => Ok(()),
        },
        9 => symlink("somewhere", &new),
        10 => match random.pick(&others) {
            Some(path) if !path.is_symlink() => fs::set_permissions(
                path,
                fs::Permissions::from_mode(random.below(0o10000) as u32),
            ),
            _ => Ok(()),
        },
        11 => match random.pick(&others) {
            Some(path) => std::os::unix::fs::lchown(
                path,
                Some(random.below(9) as u32),
                Some(random.below(9) as u32),
            ),
            None => Ok(()),
        },
        12 => match random.pick(&files) {
            Some(path) => {
                let name = format!("user.{}", random.below(4));
                let value = vec![1; random.below(40)];
                let set =
                    rustix::fs::lsetxattr(*path, name, &value, rustix::fs::XattrFlags::empty());
                set.map_err(Into::into)
            }
            None => Ok(()),
        },
        13 => match random.pick(&files) {
            Some(path) => OpenOptions::new().write(true).open(path).and_then(|file| {
                file.set_modified(
                    std::time::UNIX_EPOCH + std::time::Duration::from_nanos(random.next()),
                )
            }),
            None => Ok(()),
        },
        14 => {
            let kind = [SFlag::S_IFIFO, SFlag::S_IFSOCK, SFlag::S_IFCHR][random.below(3)];
            mknod(&new, kind, Mode::S_IRUSR, nix::sys::stat::makedev(1, 3)).map_err(Into::into)
        }
        15 => match random.pick(&files) {
            Some(path) => OpenOptions::new().write(true).open(path).and_then(|file| {
                let flags = nix::fcntl::FallocateFlags::FALLOC_FL_PUNCH_HOLE
                    | nix::fcntl::FallocateFlags::FALLOC_FL_KEEP_SIZE;
                let fd = std::os::fd::AsRawFd::as_raw_fd(&file);
                Ok(nix::fcntl::fallocate(fd, flags, 4096, 8192)?)
            }),
            None => Ok(()),
        },
        _ => match (random.pick(&files), random.pick(&files)) {
            (Some(from), Some(to)) => rustix::fs::renameat_with(
                rustix::fs::CWD,
                *from,
                rustix::fs::CWD,
                *to,
                rustix::fs::RenameFlags::EXCHANGE,
            )
            .map_err(Into::into),
            _ => Ok(()),
        },
    };
}

/// The seeds to be run: `SNAPBACK_SEEDS=100..400`, or a few.
fn seeds() -> std::ops::Range<u64> {
    let range = std::env::var("SNAPBACK_SEEDS").unwrap_or("1..9".into());
    match range.split_once("..") {
        Some((from, to)) => from.parse().unwrap()..to.parse().unwrap(),
        None => range.parse().unwrap()..range.parse::<u64>().unwrap() + 1,
    }
}

fn random_changes(sort: Sort) {
    for seed in seeds() {
        let place = Place::new(sort);
        let mut files = place.files();
        if seed % 4 == 0 {
            without_journal(&mut files);
        }
        let mut random = Random(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1);
        let run = std::panic::AssertUnwindSafe(|| {
            for _ in 0..40 {
                change(&place.seen, &mut random);
            }
            let (early, some) = (random.below(3), random.below(10));
            let mut meanwhile = || (0..some).for_each(|_| change(&place.seen, &mut random));
            let mut first = place.checkpoint_after(&mut files, &[], early, &mut meanwhile);
            let was_first = see(&place);
            for _ in 0..30 {
                change(&place.seen, &mut random);
            }
            let (early, some) = (random.below(3), random.below(10));
            let mut meanwhile = || (0..some).for_each(|_| change(&place.seen, &mut random));
            let mut second = place.checkpoint_after(&mut files, &[&first], early, &mut meanwhile);
            let was_second = see(&place);
            for round in 0..4 {
                for _ in 0..25 {
                    change(&place.seen, &mut random);
                }
                let to = random.below(2);
                let images = &mut [&mut first, &mut second];
                place.rollback(&mut files, images, to);
                let was = [&was_first, &was_second][to];
                assert_same(was, &see(&place));
                if round % 2 == 0 {
                    // Nothing is left to be done.
                    let put = place.rollback(&mut files, images, to);
                    assert_eq!(put, Put::default());
                }
            }
            drop((first, second));
            files.forget_unused();
            assert_eq!(files.kept_bytes(), 0);
        });
        if let Err(panic) = std::panic::catch_unwind(run) {
            eprintln!("seed {seed}");
            std::panic::resume_unwind(panic);
        }
    }
}

#[test]
fn tmpfs_goes_back() {
    random_changes(Sort::Tmpfs);
}

#[test]
fn overlay_goes_back() {
    random_changes(Sort::Overlay);
}

#[test]
fn volume_goes_back() {
    random_changes(Sort::Volume);
}

#[test]
fn overlay_goes_back_by_sharing_blocks() {
    random_changes(Sort::Reflink);
}

/// Inodes, and when they were changed.
fn changed_at(directory: &Path) -> BTreeMap<u64, (PathBuf, i64, i64)> {
    let mut found = BTreeMap::new();
    let mut pending = vec![directory.to_owned()];
    while let Some(path) = pending.pop() {
        let meta = fs::symlink_metadata(&path).unwrap();
        if meta.is_dir() {
            pending.extend(
                fs::read_dir(&path)
                    .unwrap()
                    .map(|entry| entry.unwrap().path()),
            );
        }
        found.insert(meta.ino(), (path, meta.ctime(), meta.ctime_nsec()));
    }
    found
}

#[test]
fn the_journal_tells_of_every_change_of_ctime() {
    for sort in [Sort::Overlay, Sort::Volume, Sort::Reflink] {
        let place = Place::new(sort);
        let Ok(mut changes) = crate::kernel::inode_changes::InodeChanges::start() else {
            println!("SKIP no journal of inodes");
            return;
        };
        let device = place.area.superblock().unwrap();
        assert!(changes.watch(device));
        let own = match &place.area.kind {
            Kind::Overlay { upper, .. } => upper.clone(),
            _ => place.directory.path().join("source"),
        };
        let mut random = Random(7);
        for step in 0..300 {
            changes.take(|_, _| {});
            let before = changed_at(&own);
            change(&place.seen, &mut random);
            let mut told = BTreeSet::new();
            assert!(changes.take(|_, number| {
                told.insert(number);
            }));
            for (number, was) in changed_at(&own) {
                let is_told = told.contains(&number);
                match before.get(&number) {
                    Some(other) if (other.1, other.2) != (was.1, was.2) => {
                        assert!(is_told, "{sort:?} {step}: {other:?} became {was:?}");
                    }
                    _ => {}
                }
            }
        }
    }
}

/// Of a file that shares its blocks with the store only what was written since is another.
#[test]
fn a_big_file_costs_nothing_where_blocks_are_shared() {
    let place = Place::new(Sort::Reflink);
    let mut files = place.files();
    let big = place.seen.join("big");
    fs::write(&big, vec![7; 64 << 20]).unwrap();
    let free = || {
        let found = rustix::fs::statvfs(place.directory.path().join("xfs")).unwrap();
        found.f_bfree * found.f_frsize
    };
    let before = free();
    let mut image = place.checkpoint(&mut files);
    assert!(before.saturating_sub(free()) < 8 << 20, "it was copied");
    let file = OpenOptions::new().write(true).open(&big).unwrap();
    file.write_all_at(&[8; 5000], 10 << 20).unwrap();
    let put = place.rollback(&mut files, &mut [&mut image], 0);
    assert!(put.bytes <= 3 * 4096, "{put:?}");
    fs::remove_file(&big).unwrap();
    let before = free();
    place.rollback(&mut files, &mut [&mut image], 0);
    assert!(before.saturating_sub(free()) < 8 << 20, "it was copied");
    assert!(fs::read(&big).unwrap().iter().all(|&byte| byte == 7));
}

#[test]
fn an_unknown_file_is_not_touched() {
    let place = Place::new(Sort::Volume);
    let mut files = place.files();
    fs::write(place.seen.join("file"), "one").unwrap();
    let mut image = place.checkpoint(&mut files);
    let ctime = || {
        let file = File::open(place.seen.join("file")).unwrap();
        let meta = file.metadata().unwrap();
        (meta.ctime(), meta.ctime_nsec(), meta.ino())
    };
    let before = ctime();
    fs::write(place.seen.join("other"), "two").unwrap();
    let put = place.rollback(&mut files, &mut [&mut image], 0);
    assert_eq!(before, ctime());
    assert_eq!(
        put.changes, 2,
        "a name goes, and a directory gets its times"
    );
}
