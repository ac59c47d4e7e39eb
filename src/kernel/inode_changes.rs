//! Which inodes of some file systems have changed: a journal kept by BPF programs (Linux 6.13).
//!
//! Since 6.13 whatever changes an inode sets its time of change (`ctime`) by functions of `fs/inode.c` that have tracepoints
//! (`include/trace/events/timestamp.h`), one more if the time stays the same. A program at each of them writes the number of the
//! inode to a ring, once between two times that is read, or a little more often. What is attached goes with the descriptors.
#![allow(unsafe_code)]

use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use memmap2::{MmapOptions, MmapRaw};
use nix::errno::Errno;

use super::bpf::{
    self, ADD_NUMBER, CALL, EXIT, Instruction, JUMP, LOAD, MOVE, MOVE_NUMBER, STORE, step,
};
use super::btf::Types;

/// Tracepoints whose first argument is an inode whose `ctime` is set.
const SETTERS: [&str; 3] = ["inode_set_ctime_to_ts", "ctime_xchg_skip", "ctime_ns_xchg"];

/// How long a record may be about to be written.
const LONG: Duration = Duration::from_millis(5);
/// Bytes of a page.
const PAGE: usize = 4096;

/// `BPF_TRACE_RAW_TP`
const TRACEPOINT: u32 = 23;
const ARRAY: u32 = 2;
const LRU_HASH: u32 = 9;
const RING: u32 = 27;
/// `BPF_F_MMAPABLE`.
const MAPPABLE: u32 = 1 << 10;

/// Bytes of the ring. A record takes 16.
const RING_SIZE: usize = 2 << 20;
/// How many inodes are known to be in the ring; of more some are written several times.
const RECENT: u32 = 1 << 14;
/// File systems that can be watched at a time.
pub const DEVICES: usize = 8;

/// Words of what the programs share with us: how often the ring was read, whether something is missing, the devices.
const GENERATION: usize = 0;
const LOST: usize = 1;
const DEVICE: usize = 2;

/// In a record, the place of the device is above the number of the inode.
const PLACE: u32 = 60;

/// The journal.
#[derive(Debug)]
pub struct InodeChanges {
    shared: MmapRaw,
    /// The page with the position up to which the ring was read.
    consumer: MmapRaw,
    /// The page with the position up to which it was written, and twice the data.
    ring: MmapRaw,
    programs: Vec<OwnedFd>,
    _attached: Vec<OwnedFd>,
    devices: Vec<u64>,
    missed: u64,
    size: usize,
}

struct Offsets {
    superblock: i16,
    number: i16,
    device: i16,
}

/// Where a jump leads to.
#[derive(Clone, Copy, PartialEq)]
enum Label {
    Lost,
    Out,
    Watched,
    Log,
}

/// A program with jumps that are not placed yet.
#[derive(Default)]
struct Assembly {
    code: Vec<Instruction>,
    jumps: Vec<(usize, Label)>,
    labels: Vec<(Label, usize)>,
}

impl Assembly {
    fn add(&mut self, code: u8, to: u8, from: u8, offset: i16, immediate: i32) {
        self.code.push(step(code, to, from, offset, immediate));
    }

    fn jump(&mut self, code: u8, to: u8, from: u8, immediate: i32, label: Label) {
        self.jumps.push((self.code.len(), label));
        self.add(code, to, from, 0, immediate);
    }

    fn label(&mut self, label: Label) {
        self.labels.push((label, self.code.len()));
    }

    /// Loads a map, or the address of its value, into a register.
    fn map(&mut self, to: u8, map: &OwnedFd, value: bool) {
        self.add(bpf::LOAD_MAP, to, 1 + u8::from(value), 0, map.as_raw_fd());
        self.add(0, 0, 0, 0, 0);
    }

    fn finish(mut self) -> Vec<Instruction> {
        for (at, label) in &self.jumps {
            let target = self.labels.iter().find(|(other, _)| other == label);
            let target = target.map_or(0, |(_, place)| *place);
            self.code[*at] = self.code[*at].with_offset((target - at - 1) as i16);
        }
        self.code
    }
}

/// What the programs have in common.
struct Maps {
    shared: OwnedFd,
    recent: OwnedFd,
    ring: OwnedFd,
}

/// A program whose first argument is an inode.
fn program(maps: &Maps, offsets: &Offsets) -> Vec<Instruction> {
    let mut code = Assembly::default();
    code.add(LOAD, 6, 1, 0, 0);
    code.add(LOAD, 2, 6, offsets.superblock, 0);
    code.add(bpf::LOAD_HALF, 2, 2, offsets.device, 0);
    code.map(7, &maps.shared, true);
    for place in 0..DEVICES {
        code.add(MOVE_NUMBER, 8, 0, 0, place as i32);
        code.add(LOAD, 3, 7, (8 * (DEVICE + place)) as i16, 0);
        code.jump(bpf::JUMP_IF_IS, 3, 0, 0, Label::Out);
        code.jump(bpf::JUMP_IF_SAME, 3, 2, 0, Label::Watched);
    }
    code.jump(JUMP, 0, 0, 0, Label::Out);
    code.label(Label::Watched);
    code.add(LOAD, 3, 6, offsets.number, 0);
    code.add(MOVE, 4, 3, 0, 0);
    code.add(bpf::SHIFT_RIGHT, 4, 0, 0, PLACE as i32);
    code.jump(bpf::JUMP_IF_NOT, 4, 0, 0, Label::Lost);
    code.add(bpf::SHIFT_LEFT, 8, 0, 0, PLACE as i32);
    code.add(bpf::OR, 3, 8, 0, 0);
    code.add(STORE, 10, 3, -8, 0);
    // Before the record is written: once this is another it is written again. With the number of the inode in it, as the kernel
    // may give what was looked up to another meanwhile.
    code.add(LOAD, 9, 7, (8 * GENERATION) as i16, 0);
    code.add(bpf::XOR, 9, 3, 0, 0);
    code.map(1, &maps.recent, false);
    code.add(MOVE, 2, 10, 0, 0);
    code.add(ADD_NUMBER, 2, 0, 0, -8);
    code.add(CALL, 0, 0, 0, bpf::MAP_LOOKUP);
    code.jump(bpf::JUMP_IF_IS, 0, 0, 0, Label::Log);
    code.add(LOAD, 1, 0, 0, 0);
    code.jump(bpf::JUMP_IF_SAME, 1, 9, 0, Label::Out);
    code.label(Label::Log);
    code.map(1, &maps.ring, false);
    code.add(MOVE, 2, 10, 0, 0);
    code.add(ADD_NUMBER, 2, 0, 0, -8);
    code.add(MOVE_NUMBER, 3, 0, 0, 8);
    // `BPF_RB_NO_WAKEUP`
    code.add(MOVE_NUMBER, 4, 0, 0, 1);
    code.add(CALL, 0, 0, 0, bpf::RING_OUTPUT);
    code.jump(bpf::JUMP_IF_NOT, 0, 0, 0, Label::Lost);
    // Only then: whoever finds it there is right that it was written. If that fails it is written again.
    code.add(STORE, 10, 9, -16, 0);
    code.map(1, &maps.recent, false);
    code.add(MOVE, 2, 10, 0, 0);
    code.add(ADD_NUMBER, 2, 0, 0, -8);
    code.add(MOVE, 3, 10, 0, 0);
    code.add(ADD_NUMBER, 3, 0, 0, -16);
    code.add(MOVE_NUMBER, 4, 0, 0, 0);
    code.add(CALL, 0, 0, 0, bpf::MAP_UPDATE);
    code.jump(JUMP, 0, 0, 0, Label::Out);
    code.label(Label::Lost);
    code.add(MOVE_NUMBER, 1, 0, 0, 1);
    code.add(STORE, 7, 1, (8 * LOST) as i16, 0);
    code.label(Label::Out);
    code.add(MOVE_NUMBER, 0, 0, 0, 0);
    code.add(EXIT, 0, 0, 0, 0);
    code.finish()
}

impl InodeChanges {
    /// Attaches the programs, and tries whether they see changes. No file system is watched yet.
    ///
    /// # Errors
    ///
    /// This kernel has not what it takes, or we may not (`CAP_BPF`, `CAP_PERFMON`).
    pub fn start() -> io::Result<Self> {
        Self::with_room(RING_SIZE)
    }

    /// `size`: bytes of the ring, a power of two.
    fn with_room(size: usize) -> io::Result<Self> {
        let types = Types::of_kernel().ok_or(Errno::ENOENT)?;
        let offset = |of, name| types.offset(of, name).ok_or(Errno::ENOSYS);
        let offsets = Offsets {
            superblock: offset("inode", "i_sb")?,
            number: offset("inode", "i_ino")?,
            device: offset("super_block", "s_dev")?,
        };
        let maps = Maps {
            shared: bpf::map(ARRAY, (4, 8 * (DEVICE + DEVICES) as u32), 1, MAPPABLE)?,
            recent: bpf::map(LRU_HASH, (8, 8), RECENT, 0)?,
            ring: bpf::map(RING, (0, 0), size as u32, 0)?,
        };
        let (mut programs, mut attached) = (Vec::new(), Vec::new());
        let code = program(&maps, &offsets);
        for name in SETTERS {
            let tracepoint = types.tracepoint(name).ok_or(Errno::ENOSYS)?;
            let loaded = bpf::load(&code, TRACEPOINT, tracepoint)?;
            attached.push(bpf::attach(loaded.as_fd(), TRACEPOINT, &[])?);
            programs.push(loaded);
        }
        let map = |map: &OwnedFd, offset: usize, len| {
            let options = MmapOptions::new().offset(offset as u64).len(len).to_owned();
            (options, map.as_raw_fd())
        };
        let (shared, of_shared) = map(&maps.shared, 0, PAGE);
        let (consumer, of_consumer) = map(&maps.ring, 0, PAGE);
        let (ring, of_ring) = map(&maps.ring, PAGE, PAGE + 2 * size);
        let mut changes = Self {
            shared: shared.map_raw(of_shared)?,
            consumer: consumer.map_raw(of_consumer)?,
            ring: ring.map_raw_read_only(of_ring)?,
            programs,
            _attached: attached,
            devices: Vec::new(),
            missed: 0,
            size,
        };
        changes.word(GENERATION).store(1, Ordering::SeqCst);
        changes.try_out()?;
        Ok(changes)
    }

    /// Watches a file system from now on, by the device of its superblock, which `mountinfo` tells. False: too many are.
    pub fn watch(&mut self, device: u64) -> bool {
        if self.devices.contains(&device) {
            return true;
        }
        if self.devices.len() == DEVICES {
            return false;
        }
        let (major, minor) = (nix::sys::stat::major(device), nix::sys::stat::minor(device));
        self.word(DEVICE + self.devices.len())
            .store(major << 20 | minor, Ordering::SeqCst);
        self.devices.push(device);
        true
    }

    /// Takes what has changed until now: calls `each` with device and number of every inode, some more than once. False:
    /// something is missing.
    pub fn take(&mut self, mut each: impl FnMut(u64, u64)) -> bool {
        self.word(GENERATION).fetch_add(1, Ordering::SeqCst);
        let (read, written) = (self.position(&self.consumer), self.position(&self.ring));
        let mut at = read.load(Ordering::Relaxed);
        let (begun, mut late) = (Instant::now(), false);
        while at < written.load(Ordering::Acquire) {
            let (length, value) = self.record(at);
            // It is being written, and others behind it have been: by a task that may wait for a processor.
            if length & 1 << 31 != 0 {
                if begun.elapsed() > LONG {
                    late = true;
                    break;
                }
                std::thread::yield_now();
                continue;
            }
            if let Some(device) = self.devices.get((value >> PLACE) as usize) {
                each(*device, value & ((1 << PLACE) - 1));
            }
            at += 16;
        }
        read.store(at, Ordering::Release);
        let missed: Result<Vec<u64>, Errno> = self.programs.iter().map(bpf::missed).collect();
        let missed = missed.map_or(u64::MAX, |missed| missed.iter().sum());
        let is_complete = std::mem::replace(&mut self.missed, missed) == missed;
        let lost = self.word(LOST).swap(0, Ordering::SeqCst) != 0;
        is_complete && missed != u64::MAX && !lost && !late
    }

    /// Changes a file in memory, to see whether that is told on this kernel.
    fn try_out(&mut self) -> io::Result<()> {
        use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt};
        let name = c"snapback-try";
        let made =
            nix::sys::memfd::memfd_create(name, nix::sys::memfd::MemFdCreateFlag::MFD_CLOEXEC);
        let file = std::fs::File::from(made?);
        let number = file.metadata()?.ino();
        self.watch(file.metadata()?.dev());
        let is_told = |changes: &mut Self| -> io::Result<bool> {
            let mut told = false;
            let complete = changes.take(|_, other| told |= other == number);
            // Times that were looked at have to be others after the next change.
            file.metadata()?;
            Ok(told && complete)
        };
        is_told(self)?;
        let mut tried = Vec::new();
        file.write_all_at(&[1; 5000], 0)?;
        tried.push(is_told(self)?);
        file.set_permissions(std::fs::Permissions::from_mode(0o640))?;
        tried.push(is_told(self)?);
        file.set_modified(std::time::UNIX_EPOCH)?;
        tried.push(is_told(self)?);
        file.set_len(3)?;
        tried.push(is_told(self)?);
        self.word(DEVICE).store(0, Ordering::SeqCst);
        self.devices.clear();
        match tried.iter().all(|told| *told) {
            true => Ok(()),
            false => Err(Errno::ENOSYS.into()),
        }
    }

    fn word(&self, index: usize) -> &AtomicU64 {
        assert!(index < DEVICE + DEVICES);
        // SAFETY: it is in the page that is mapped as long as `self` lives, aligned, and both sides read and write it as a
        // whole.
        unsafe { AtomicU64::from_ptr(self.shared.as_mut_ptr().cast::<u64>().add(index)) }
    }

    /// The first word of a page of the ring.
    fn position<'a>(&'a self, page: &'a MmapRaw) -> &'a AtomicU64 {
        // SAFETY: as for `word`; that of the producer is only read, and loads of a word need no writable memory.
        unsafe { AtomicU64::from_ptr(page.as_mut_ptr().cast()) }
    }

    /// Length and content of a record.
    fn record(&self, at: u64) -> (u32, u64) {
        let offset = PAGE + (at as usize & (self.size - 1));
        // SAFETY: records of 16 bytes are aligned, and within the data, which is mapped behind the first page; the content is
        // not written again before the consumer's position has passed it.
        unsafe {
            let start = self.ring.as_ptr().add(offset);
            let length = AtomicU32::from_ptr(start.cast_mut().cast()).load(Ordering::Acquire);
            (length, start.add(8).cast::<u64>().read())
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;
    use std::fs::{self, File, OpenOptions};
    use std::io::Write;
    use std::os::unix::fs::{MetadataExt, PermissionsExt};

    use super::*;

    #[test]
    fn every_change_of_an_inode_is_told() {
        let mut changes = match InodeChanges::start() {
            Ok(changes) => changes,
            Err(error) => {
                println!("SKIP no journal of inodes: {error}");
                return;
            }
        };
        let place = tempfile::tempdir_in("/var/tmp").unwrap();
        let at = |name: &str| place.path().join(name);
        let number = |name: &str| fs::symlink_metadata(at(name)).unwrap().ino();
        fs::write(at("one"), "one").unwrap();
        fs::write(at("two"), "two").unwrap();
        let here = fs::metadata(place.path()).unwrap();
        let open = OpenOptions::new().write(true).open(at("two")).unwrap();
        assert!(changes.watch(here.dev()));
        let mut told = |act: &mut dyn FnMut()| {
            changes.take(|_, _| {});
            for entry in fs::read_dir(place.path()).unwrap() {
                entry.unwrap().metadata().unwrap();
            }
            fs::metadata(place.path()).unwrap();
            act();
            let mut told = HashSet::new();
            changes.take(|device, number| {
                assert_eq!(device, here.dev());
                told.insert(number);
            });
            told
        };
        let (one, two) = (number("one"), number("two"));
        let quiet = told(&mut || drop(File::open(at("one")).unwrap()));
        assert!(!quiet.contains(&one) && !quiet.contains(&two));
        let written = told(&mut || (&open).write_all(b"more").unwrap());
        assert!(!written.contains(&one) && written.contains(&two));
        let linked = told(&mut || fs::hard_link(at("one"), at("three")).unwrap());
        assert!(linked.contains(&one) && linked.contains(&here.ino()));
        let moved = told(&mut || fs::rename(at("three"), at("four")).unwrap());
        assert!(moved.contains(&one) && moved.contains(&here.ino()));
        let gone = told(&mut || fs::remove_file(at("four")).unwrap());
        assert!(gone.contains(&one) && gone.contains(&here.ino()));
        let rights = told(&mut || {
            fs::set_permissions(at("one"), fs::Permissions::from_mode(0o600)).unwrap();
        });
        assert!(rights.contains(&one) && !rights.contains(&two));
        let made = told(&mut || fs::create_dir(at("below")).unwrap());
        assert!(made.contains(&here.ino()) && made.contains(&number("below")));
    }

    #[test]
    fn more_than_there_is_room_for_is_known_to_be_missing() {
        let Ok(mut changes) = InodeChanges::with_room(PAGE) else {
            println!("SKIP no journal of inodes");
            return;
        };
        let file = tempfile::tempfile_in("/var/tmp").unwrap();
        changes.watch(file.metadata().unwrap().dev());
        while !changes.take(|_, _| {}) {}
        let held: Vec<File> = (0..1 + PAGE / 16)
            .map(|_| tempfile::tempfile_in("/var/tmp").unwrap())
            .collect();
        let mut told = 0;
        assert!(!changes.take(|_, _| told += 1), "{told}");
        drop(held);
        changes.take(|_, _| {});
        file.metadata().unwrap();
        file.set_len(1).unwrap();
        let number = std::os::unix::fs::MetadataExt::ino(&file.metadata().unwrap());
        let mut again = false;
        changes.take(|_, other| again |= other == number);
        assert!(again);
    }
}
