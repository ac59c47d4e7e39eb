//! The processes of a container that is made of a checkpoint, and their address spaces.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsStr;
use std::fs::File;
use std::os::fd::AsFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::time::SystemTime;

use nix::fcntl::OFlag;
use nix::unistd::Pid;

use crate::checkpoint::{Checkpoint, Spaces};
use crate::filesystem;
use crate::freeze::{self, LEAST_NO_PID, Stopped};
use crate::image::Program;
use crate::kernel::{confined, last_pid, procfs, sysv_segment};
use crate::memory::{self, Segments, SharedImage, Space, SpaceImage, Stored};
use crate::objects::{self, Made};
use crate::outcome::Refusal;
use crate::phases::Phases;
use crate::record::{Context, ObjectId};
use crate::rollback::Failure;
use crate::task::{self, Renamed};

use super::contents::Contents;
use super::origin::Origin;
use super::{Result, system};

/// Descriptors of the container's init that stay: its standard streams.
const STREAMS: u32 = 3;

/// What a recorded process or thread is called before it was made: it can't be mistaken for one that is there.
fn to_be(recorded: Pid) -> Pid {
    Pid::from_raw(recorded.as_raw() + LEAST_NO_PID)
}

/// A tree on its way to be what was recorded.
pub(super) struct Work<'w, 't> {
    stopped: &'w mut Stopped<'t>,
    spaces: &'w mut Spaces,
    origin: &'w Origin,
    /// Compare pages with the image.
    verify: bool,
    /// The root directory of the container.
    directory: File,
    /// The container's IPC namespace.
    namespace: File,
    /// Files that are made of the image.
    contents: Contents,
    renamed: Renamed,
    /// Numbers in our PID namespace that may not be had by others.
    numbers: BTreeSet<Pid>,
    made: Vec<Made>,
    images: Vec<SpaceImage>,
}

impl<'w, 't> Work<'w, 't> {
    pub(super) fn new(
        stopped: &'w mut Stopped<'t>,
        spaces: &'w mut Spaces,
        origin: &'w Origin,
        verify: bool,
    ) -> Result<Self> {
        let root = stopped.root();
        let directory = File::open(procfs::path(root, "root"));
        let directory = directory.map_err(system("open the container's root directory"))?;
        let namespace = File::open(procfs::path(root, "ns/ipc"));
        let namespace = namespace.map_err(system("open the container's IPC namespace"))?;
        let mut renamed = Renamed::default();
        let recorded = origin.recorded(&Renamed::default())?;
        for process in recorded.processes() {
            let threads = process.threads.keys().copied();
            for number in threads.chain([process.pid()]) {
                renamed.rename(number, to_be(number));
            }
        }
        Ok(Self {
            stopped,
            spaces,
            origin,
            verify,
            contents: Contents::make(origin, &directory, &namespace)?,
            namespace,
            directory,
            renamed,
            numbers: BTreeSet::from([root]),
            made: Vec::new(),
            images: Vec::new(),
        })
    }

    /// Makes all of it, and the checkpoint that a rollback is to bring the tree to.
    pub(super) fn run(mut self, name: &str, phases: &mut Phases) -> Result<Checkpoint> {
        task::prepare(self.stopped)?;
        let (living, zombies) = self.order()?;
        let mut live = None;
        for recorded in living {
            self.process(recorded, live.is_none(), phases)?;
            if live.is_none() {
                live = Some(self.streams()?);
            }
        }
        let pids: Vec<Pid> = self
            .made
            .iter()
            .map(|made| Pid::from_raw(made.is.0))
            .collect();
        let recorded = self.origin.recorded(&self.renamed)?;
        task::join_groups(self.stopped, &recorded, &pids)?;
        for recorded in zombies {
            self.zombie(recorded)?;
        }
        phases.end("processes");
        self.remove_segments()?;
        let live = live.ok_or(freeze::Error::Gone(self.stopped.root()))?;
        self.checkpoint(name, &pids, live, phases)
    }

    /// Removes System V segments that were removed while they were attached.
    fn remove_segments(&self) -> Result<()> {
        let segments = self.origin.image.segments.own().unwrap_or_default();
        let removed = segments.iter().filter(|segment| segment.is_removed());
        let ids: Vec<i32> = removed.map(|segment| segment.id).collect();
        if ids.is_empty() {
            return Ok(());
        }
        let done = sysv_segment::remove(self.namespace.as_fd(), &ids);
        Ok(done.map_err(system("remove System V shared memory"))?)
    }

    /// The recorded processes, parents before their children; zombies apart, which have none.
    fn order(&self) -> Result<(Vec<Pid>, Vec<Pid>)> {
        let recorded = self.origin.recorded(&Renamed::default())?;
        let mut children: BTreeMap<Pid, Vec<Pid>> = BTreeMap::new();
        let mut todo = Vec::new();
        for process in recorded.processes() {
            match recorded.process(process.parent()) {
                Some(parent) => children
                    .entry(parent.pid())
                    .or_default()
                    .push(process.pid()),
                None => todo.push(process.pid()),
            }
        }
        let mut order = Vec::new();
        while let Some(pid) = todo.pop() {
            order.push(pid);
            todo.extend(children.remove(&pid).into_iter().flatten());
        }
        let is_zombie = |pid: &Pid| recorded.process(*pid).is_some_and(|it| it.is_zombie());
        let (zombies, living) = order.into_iter().partition(is_zombie);
        Ok((living, zombies))
    }

    /// Makes one process; `is_root`: it is the container's init, which is there.
    fn process(&mut self, was: Pid, is_root: bool, phases: &mut Phases) -> Result<()> {
        let called = to_be(was);
        let recorded = self.origin.recorded(&self.renamed)?;
        let is = match is_root {
            true => task::identify(self.stopped, self.stopped.root())?,
            false => task::make(self.stopped, &recorded, called, None, &self.numbers)?,
        };
        let pid = Pid::from_raw(is.pid);
        self.learn(was, &is)?;
        let id = self.origin.space_of(was)?;
        let stored = self.stored(id)?;
        let context = self.origin.context();
        let mut image = SpaceImage::stored(context, id, pid, stored)?;
        image.advice(context)?;
        if is_root || !self.may_pass_for(was, &image)? {
            let kept = if is_root { STREAMS } else { 0 };
            memory::execute_program(self.stopped, pid, &image, kept)?;
        }
        phases.end("program");
        let mut space = Space::reopen(self.stopped, pid, &image, context)?;
        image.move_to(self.stopped, &mut space)?;
        let recorded = self.origin.recorded(&self.renamed)?;
        if !is_root {
            task::clear(self.stopped, &recorded, pid)?;
        }
        let mut plan = space.plan_remake(self.stopped, &image, context)?;
        space.restore_layout(self.stopped, &image, &plan)?;
        space.restore_program(self.stopped, &image, context)?;
        let process = recorded.process(pid).ok_or(freeze::Error::Gone(was))?;
        let directory = self.open(
            Path::new(OsStr::from_bytes(process.directory)),
            OFlag::O_PATH | OFlag::O_DIRECTORY,
        )?;
        task::settle_anew(self.stopped, &recorded, pid, &directory)?;
        phases.end("map");
        if !is_root {
            space.keep_equal(self.stopped, &image, &mut plan)?;
        }
        space.start_copy(self.stopped, &mut image, context, &plan)?;
        space.finish_copy(self.stopped)?;
        phases.end("pages");
        if self.verify {
            let differences = memory::verify_made(self.stopped, &image, context)?;
            if !differences.is_empty() {
                return Err(Failure::Different(differences).into());
            }
            phases.end("verify");
        }
        self.spaces.insert(pid, space);
        self.images.push(image);
        Ok(())
    }

    /// Whether a child of its parent need not execute its program to be taken for it.
    fn may_pass_for(&self, was: Pid, image: &SpaceImage) -> Result<bool> {
        let recorded = self.origin.recorded(&Renamed::default())?;
        let maker = recorded
            .process(was)
            .and_then(|process| recorded.begins_as(process))
            .ok_or(freeze::Error::Gone(was))?;
        let now = self.renamed.number(maker.pid());
        let of_maker = self.images.iter().find(|image| image.pid == now);
        let is_same = of_maker.is_some_and(|of_maker| memory::same_program(image, of_maker));
        Ok(is_same || task::may_set_program(maker))
    }

    /// Makes a process and ends it as it had ended.
    fn zombie(&mut self, was: Pid) -> Result<()> {
        let called = to_be(was);
        let recorded = self.origin.recorded(&self.renamed)?;
        let is = task::make(self.stopped, &recorded, called, None, &self.numbers)?;
        self.learn(was, &is)?;
        let recorded = self.origin.recorded(&self.renamed)?;
        Ok(task::end(self.stopped, &recorded, Pid::from_raw(is.pid))?)
    }

    /// Notes what a recorded process is now.
    fn learn(&mut self, was: Pid, is: &task::Identity) -> Result<()> {
        let recorded = self.origin.recorded(&Renamed::default())?;
        let process = recorded.process(was).ok_or(freeze::Error::Gone(was))?;
        let called = to_be(was);
        self.made.push(Made {
            was: (was.as_raw(), process.identity.pidfd_inode),
            is: (is.pid, is.pidfd_inode),
            name: process.comm(),
        });
        self.numbers.insert(Pid::from_raw(is.pid));
        self.renamed.reborn(called, is);
        Ok(())
    }

    /// The descriptors of the root while it has its standard streams only.
    fn streams(&mut self) -> Result<objects::Capture> {
        let mut scratch = Context::buffering()?;
        let found = objects::find(self.stopped)?;
        let looked = found.look(&mut scratch)?;
        Ok(looked.record(self.stopped, &mut scratch)?)
    }

    fn open(&self, path: &Path, flags: OFlag) -> Result<File> {
        let opened = confined::open(self.directory.as_fd(), path, flags);
        let what = format!("open {} in the container", path.display());
        Ok(opened
            .map_err(|errno: nix::errno::Errno| system(&what)(errno.into()))?
            .into())
    }

    /// An address space with the files that are to be mapped into it.
    fn stored(&self, id: ObjectId) -> Result<Stored> {
        let space = &self.origin.image.spaces[&id];
        let mut files = BTreeMap::new();
        for vma in self.origin.vmas(id)? {
            let key = (vma.device, vma.inode);
            if vma.is_anonymous() || vma.is_segment() || files.contains_key(&key) {
                continue;
            }
            let opened = match self.contents.files.get(&key) {
                Some(made) => made.try_clone().map_err(system("duplicate a descriptor"))?,
                None => {
                    let path = Path::new(OsStr::from_bytes(&vma.name));
                    self.mapped(path, &space.program, key)?
                }
            };
            files.insert(key, opened);
        }
        let program = &space.program;
        let key = (program.device, program.inode);
        Ok(Stored {
            smaps: space.smaps.clone(),
            guards: space.guards.clone(),
            bounds: space.bounds,
            auxv: space.auxv.clone(),
            // Refused if there are any.
            policies: None,
            program: self.mapped(&program.path, program, key)?,
            program_path: program.path.clone(),
            files,
            pages: self.origin.image.pages(id),
        })
    }

    /// Opens a file that was mapped, and refuses another than that: what the program has read of it is in its memory.
    fn mapped(&self, path: &Path, program: &Program, key: (u64, u64)) -> Result<File> {
        let refuse = |problem: String| Refusal {
            object: format!("{}, which was mapped", path.display()),
            holder: "the container".into(),
            remedy: format!("{problem}; put back the one that was there, then try again"),
        };
        let opened = confined::open(self.directory.as_fd(), path, OFlag::O_PATH);
        let opened = opened.map_err(|errno| refuse(format!("it is not there: {errno}")))?;
        let opened = File::from(opened);
        let mut known = program.files.iter();
        if let Some(was) = known.find(|file| (file.device, file.inode) == key) {
            let is = opened.metadata().map_err(system("look at a file"))?;
            let modified = is.mtime() * 1_000_000_000 + is.mtime_nsec();
            // Ends that were cut off or added would be felt, and so would other code; a time alone is changed by copying.
            if is.len() != was.size {
                let sizes = format!("it had {} bytes and has {}", was.size, is.len());
                return Err(refuse(sizes).into());
            }
            if modified != was.modified_ns {
                tracing::warn!(path = %path.display(), "a file that was mapped has another time of change");
            }
        }
        Ok(opened)
    }

    /// Makes shadows of all address spaces, which are as recorded, and the records that go with them.
    fn checkpoint(
        self,
        name: &str,
        pids: &[Pid],
        live: objects::Capture,
        phases: &mut Phases,
    ) -> Result<Checkpoint> {
        let Self {
            stopped,
            spaces,
            origin,
            directory,
            contents,
            renamed,
            made,
            ..
        } = self;
        let mut context = Context::buffering()?;
        task::transplant(stopped, origin.context(), &renamed, &mut context)?;
        let root = (stopped.root().as_raw(), directory.as_fd());
        let mut objects =
            objects::transplant(origin.context(), live, &made, contents.nameless(), root)?;
        for id in objects.recorded.descriptions.keys() {
            context.adopt(*id);
        }
        let recorded = objects::as_recorded(&mut objects, &made);
        objects::records::write(&mut context, &recorded)?;
        phases.end("records");
        shadows_out_of_the_way(stopped, origin)?;
        let forks = memory::start_shadows(stopped, pids);
        let shadows = forks.finish(stopped)?;
        phases.end("fork");
        let mut images = Vec::new();
        let mut resident_pages = 0;
        let called: BTreeMap<i32, i32> = made.iter().map(|it| (it.is.0, it.was.0)).collect();
        for (pid, shadow) in pids.iter().zip(shadows) {
            let called = called.get(&pid.as_raw()).copied();
            let called = called.map_or(*pid, Pid::from_raw);
            let space = spaces.get_mut(pid).ok_or(freeze::Error::Gone(*pid))?;
            // Nothing is known of its standing yet that a later checkpoint could compare.
            let named = (called, Vec::new());
            let (image, armed) = space.capture(stopped, shadow, None, named, &mut context)?;
            space.conclude(Some(&image));
            resident_pages += armed.pages;
            images.push(image);
        }
        let segments = Segments::capture(stopped, &images)?;
        let shared: Vec<_> = contents.shared().map(|fd| (Pid::this(), fd)).collect();
        let shared = SharedImage::capture_all(&images, &shared, &mut context)?;
        context.finish()?;
        phases.end("memory");
        let recorded = task::Recorded::read(&context, &renamed)?;
        let (processes, threads) = (recorded.processes().count(), recorded.thread_count());
        let losses = stopped.tree().losses();
        drop(recorded);
        Ok(Checkpoint {
            name: name.to_owned(),
            taken_at: SystemTime::now(),
            context: context.into(),
            spaces: images,
            shared,
            segments,
            objects,
            files: filesystem::Image::default(),
            uses: Vec::new(),
            renamed,
            processes,
            threads,
            resident_pages,
            copied_pages: 0,
            new_pages: resident_pages,
            number: 0,
            pinned: false,
            losses,
        })
    }
}

/// Has shadows get numbers in the container's PID namespace that no recorded process or thread had: those that are not there
/// yet will be made under theirs.
fn shadows_out_of_the_way(stopped: &Stopped<'_>, origin: &Origin) -> Result<()> {
    let recorded = origin.recorded(&Renamed::default())?;
    let of_threads = recorded.processes().flat_map(|process| {
        let threads = process.threads.values();
        threads.map(|thread| thread.record.state.namespace_tid as i32)
    });
    let of_processes = recorded
        .processes()
        .map(|process| process.identity.namespace_pid);
    let last = of_threads.chain(of_processes).max().unwrap_or(1);
    let namespace = File::open(procfs::path(stopped.root(), "ns/pid"));
    let namespace = namespace.map_err(system("open the container's PID namespace"))?;
    last_pid::set_next_in(namespace.as_fd(), last + 1)
        .map_err(system("choose the numbers of shadows"))?;
    Ok(())
}
