//! `persist`: images of programs that run on, and what is left of those that were not finished.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;
use snapback::fault;
use snapback::image::Opened;
use snapback::memory::Span;
use snapback::record::ObjectId;

use crate::support::container::{Containers, unique};
use crate::support::fixture::Fixture;
use crate::support::session::{Answer, DONE, ERROR, REFUSED, Session, USAGE};
use crate::support::{skip, wait};

/// A program, a checkpoint of it without files, and where an image of it goes.
struct Setting {
    session: Session,
    fixture: Fixture,
    target: PathBuf,
}

impl Setting {
    fn new(program: &str) -> Self {
        Self::with(program, Session::new())
    }

    fn with(program: &str, session: Session) -> Self {
        Self::of(Fixture::start(program), session)
    }

    fn of(fixture: Fixture, mut session: Session) -> Self {
        session.will_release(fixture.pid());
        let target = session.scratch().join("images/one");
        fs::create_dir_all(target.with_file_name("")).expect("making a directory");
        let setting = Self {
            session,
            fixture,
            target,
        };
        setting.checkpoint();
        setting
    }

    fn checkpoint(&self) {
        let pid = self.fixture.pid().to_string();
        let arguments = ["checkpoint", "--no-files", "--pid", &pid];
        self.session.run(&arguments).expect(DONE, "checkpoint");
    }

    fn persist(&self, more: &[&str]) -> Answer {
        self.persist_to(&self.target, more)
    }

    fn persist_to(&self, target: &Path, more: &[&str]) -> Answer {
        let pid = self.fixture.pid().to_string();
        let to = target.to_str().expect("a path in UTF-8");
        let mut arguments = vec!["persist", "--image-path", to, "--pid", &pid];
        arguments.extend(more);
        self.session.run(&arguments)
    }

    /// The `state` that `checkpoints` shows.
    fn state(&self) -> String {
        let pid = self.fixture.pid().to_string();
        let listed = self.session.run(&["checkpoints", "--json", "--pid", &pid]);
        let listed = listed.expect(DONE, "checkpoints");
        let state = listed.report["checkpoints"][0]["state"].as_str();
        state.expect("a state").to_owned()
    }

    /// The files of the image, if there is one.
    fn image(&self) -> BTreeMap<String, Vec<u8>> {
        contents(&self.target)
    }

    /// What lies beside the image.
    fn beside(&self) -> Vec<String> {
        let entries = fs::read_dir(self.target.with_file_name("")).expect("listing");
        let names = entries.map(|entry| entry.expect("an entry").file_name());
        let names = names.map(|name| name.to_string_lossy().into_owned());
        names.filter(|name| name != "one").collect()
    }
}

fn contents(directory: &Path) -> BTreeMap<String, Vec<u8>> {
    let entries = fs::read_dir(directory).into_iter().flatten();
    let paths = entries.map(|entry| entry.expect("an entry").path());
    let name = |path: &Path| {
        path.file_name()
            .unwrap_or_default()
            .to_string_lossy()
            .into()
    };
    let read = |path: PathBuf| (name(&path), fs::read(&path).expect("reading"));
    paths.map(read).collect()
}

#[test]
fn a_checkpoint_is_on_disk_and_still_in_ram() {
    let mut setting = Setting::new("dirty_pages");
    assert_eq!(setting.state(), "resident");
    for compress in ["none", "zstd"] {
        let answer = setting
            .persist(&["--json", "--compress", compress])
            .expect(DONE, "persist");
        let last = answer.out.lines().last().expect("a line");
        let last: Value = serde_json::from_str(last).expect("JSON");
        assert_eq!(last["event"], "persisted", "{answer:#?}");
        let files = setting.image();
        let bytes: usize = files.values().map(Vec::len).sum();
        assert_eq!(last["image_bytes"].as_u64(), Some(bytes as u64));
        assert_eq!(setting.state(), "durable");
        assert_eq!(setting.beside(), [""; 0]);
        let mode = fs::metadata(&setting.target)
            .expect("stat")
            .permissions()
            .mode();
        assert_eq!(mode & 0o7777, 0o700);
        let opened = Opened::open(&setting.target).expect("an image");
        opened.verify().expect("whole");
        assert_eq!(opened.info.name, "default");

        setting.fixture.mutate();
        setting.session.rollback(setting.fixture.pid());
        setting.fixture.verify("persisted");
    }
    // What is not there any more is not durable.
    fs::remove_dir_all(&setting.target).expect("removing");
    assert_eq!(setting.state(), "resident");
}

#[test]
fn inspect_shows_the_same_of_a_checkpoint_and_of_its_image() {
    let setting = Setting::new("child_family");
    setting.persist(&[]).expect(DONE, "persist");
    let pid = setting.fixture.pid().to_string();
    let directory = setting.target.to_str().expect("a path in UTF-8");
    let inspect = |what: &[&str]| {
        let arguments = [&["inspect", "--json"], what].concat();
        setting
            .session
            .run(&arguments)
            .expect(DONE, "inspect")
            .report
    };
    let (held, image) = (inspect(&["--pid", &pid]), inspect(&[directory]));
    for field in ["processes", "descriptors", "shared"] {
        assert_eq!(held[field], image[field], "{field}");
    }
    let members = setting.fixture.family.members();
    let recorded = image["processes"].as_array().expect("processes");
    assert!(recorded.len() > 1);
    // Shadows are among the members.
    assert!(recorded.iter().all(|process| {
        members
            .iter()
            .any(|pid| process["pid"].as_i64() == Some(i64::from(*pid)))
    }));
    assert_eq!(image["problems"].as_array().map(Vec::len), Some(0));

    let shown = setting
        .session
        .run(&["inspect", directory])
        .expect(DONE, "inspect");
    for line in ["processes", "records", "descriptors", "child_family"] {
        assert!(shown.out.contains(line), "{line}: {}", shown.out);
    }
    let memory = setting.target.join("memory.img");
    let mut bytes = fs::read(&memory).expect("reading");
    let middle = bytes.len() / 2;
    bytes[middle] ^= 4;
    fs::write(&memory, bytes).expect("writing");
    let shown = setting
        .session
        .run(&["inspect", directory])
        .expect(ERROR, "inspect");
    assert!(
        shown.out.contains("damaged") && shown.out.contains(" at byte "),
        "{shown:#?}"
    );
    assert!(shown.out.contains("descriptors"), "{shown:#?}");
    let answer = setting.session.run(&["inspect"]).expect(USAGE, "inspect");
    assert!(answer.err.contains("DIR|ID"), "{answer:#?}");
}

#[test]
fn deleted_files_and_shared_memory_are_in_the_image() {
    for (program, has_nameless) in [
        ("deleted_file", true),
        ("deleted_file_map", true),
        ("shared_anon", false),
        ("sysv_memory", false),
        ("memfd", false),
    ] {
        let mut setting = Setting::new(program);
        setting.persist(&[]).expect(DONE, program);
        let opened = Opened::open(&setting.target).expect(program);
        opened.verify().expect(program);
        assert_eq!(!opened.nameless.is_empty(), has_nameless, "{program}");
        for (id, file) in &opened.nameless {
            let last = opened
                .runs(*id)
                .last()
                .map_or(0, |run| run.address + u64::from(run.pages) * 4096);
            assert!(last < file.size + 4096, "{program}: {file:?}");
        }
        let shared = opened.shared().expect(program);
        assert_eq!(shared.is_empty(), has_nameless, "{program}");
        setting.fixture.verify(program);
    }
}

#[test]
fn what_is_in_the_way_is_refused() {
    let setting = Setting::new("dirty_pages");
    fs::create_dir(&setting.target).expect("making a directory");
    fs::write(setting.target.join("letter"), "dear").expect("writing");
    let answer = setting.persist(&[]).expect(REFUSED, "persist");
    assert!(
        answer.err.contains("empty or does not exist"),
        "{answer:#?}"
    );
    assert_eq!(setting.image().len(), 1);
    assert_eq!(setting.state(), "resident");
    let answer = setting
        .persist(&["--name", "other"])
        .expect(ERROR, "persist");
    assert!(
        answer.err.contains("no checkpoint \"other\""),
        "{answer:#?}"
    );
    let missing = setting.target.join("not/there");
    let answer = setting.persist_to(&missing, &[]).expect(ERROR, "persist");
    assert!(answer.err.contains("No such file"), "{answer:#?}");
}

/// At every point the keeper is killed: what was there is there, and the next one removes what was begun.
#[test]
fn a_keeper_that_is_killed_leaves_the_old_image_or_the_new_one() {
    for point in fault::POINTS
        .iter()
        .filter(|point| point.starts_with("persist."))
    {
        println!("{point}");
        let mut setting = Setting::new("dirty_pages");
        setting.persist(&[]).expect(DONE, "persist");
        let before = setting.image();
        setting.session.release(setting.fixture.pid());
        wait::until("the keeper ends", || setting.session.keepers().is_empty());

        setting.session.set(fault::VARIABLE, point);
        setting.fixture.mutate();
        setting.checkpoint();
        let answer = setting.persist(&[]);
        assert_ne!(answer.status, DONE, "{point} was not reached: {answer:#?}");
        wait::until("the keeper is dead", || {
            setting.session.keepers().is_empty()
        });
        let is_new = ["persist.renamed", "persist.published"].contains(point);
        assert_eq!(setting.image() != before, is_new, "{point}");
        let opened = Opened::open(&setting.target).expect(point);
        opened.verify().expect(point);
        setting.fixture.run_on();

        setting.session.unset(fault::VARIABLE);
        setting.checkpoint();
        setting.persist(&[]).expect(DONE, point);
        assert_eq!(setting.beside(), [""; 0], "{point}");
        Opened::open(&setting.target)
            .expect(point)
            .verify()
            .expect(point);
    }
}

/// A file system of its own, gone with it.
struct Mounted(PathBuf);

impl Mounted {
    fn new(at: &Path, options: &str) -> Self {
        fs::create_dir_all(at).expect("making a directory");
        let tmpfs = Some("tmpfs");
        mount(tmpfs, at, tmpfs, MsFlags::empty(), Some(options)).expect("mounting");
        Self(at.to_owned())
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        let _ = umount2(&self.0, MntFlags::MNT_DETACH);
    }
}

#[test]
fn a_full_disk_leaves_the_image_that_was_there() {
    let mut setting = Setting::new("dirty_pages");
    setting.persist(&[]).expect(DONE, "persist");
    let needed: usize = setting.image().values().map(Vec::len).sum();
    let small = Mounted::new(
        &setting.session.scratch().join("small"),
        &format!("size={}", needed + needed / 2),
    );
    let target = small.0.join("image");
    setting.persist_to(&target, &[]).expect(DONE, "persist");
    let before = contents(&target);
    let answer = setting.persist_to(&target, &[]).expect(ERROR, "persist");
    assert!(answer.err.contains("No space left"), "{answer:#?}");
    assert_eq!(contents(&target), before);
    let left = fs::read_dir(&small.0).expect("listing").count();
    assert_eq!(left, 1, "what was begun is removed");
    setting.fixture.verify("a full disk");
}

/// The same command, which ends by `SIGINT` though we may ignore it: what a shell starts in the background does.
fn interruptible(command: Command) -> Command {
    let mut again = Command::new("env");
    again.arg("--default-signal=INT");
    again.arg(command.get_program()).args(command.get_args());
    for (name, value) in command.get_envs() {
        match value {
            Some(value) => again.env(name, value),
            None => again.env_remove(name),
        };
    }
    again
}

/// A program whose memory takes a while to be written, as it can't be compressed.
const LARGE: &str = r#"
import os, sys
data = os.urandom(256 << 20)
print("READY", flush=True)
while command := sys.stdin.read(1):
    if command == "m":
        data = b"other"
        print("MUTATED", flush=True)
    elif command == "v":
        print("PASS" if len(data) == 256 << 20 else "FAIL", flush=True)
    elif command == "q":
        break
"#;

#[test]
fn an_interrupted_client_cancels() {
    if !Path::new("/usr/bin/python3").exists() {
        skip!("no python3");
    }
    let mut command = Command::new("python3");
    command.args(["-c", LARGE]);
    let mut setting = Setting::of(Fixture::launch("large", command), Session::new());
    let pid = setting.fixture.pid().to_string();
    let keeper = Pid::from_raw(setting.session.keepers()[0]);
    let begun = setting.target.with_file_name(".one.persisting");
    // The keeper is held in the middle, so that the client hangs up before all is written; it may have been too quick.
    let was_cancelled = (0..20).any(|_| {
        let mut command = interruptible(setting.session.command());
        command.args(["persist", "--compress", "zstd", "--pid", &pid]);
        command.arg("--image-path").arg(&setting.target);
        let mut child = command.stdout(Stdio::null()).spawn().expect("starting");
        wait::until("it has begun, or is over", || {
            begun.exists() || child.try_wait().expect("waiting").is_some()
        });
        kill(keeper, Signal::SIGSTOP).expect("kill");
        let _ = kill(Pid::from_raw(child.id() as i32), Signal::SIGINT);
        let status = child.wait().expect("waiting");
        kill(keeper, Signal::SIGCONT).expect("kill");
        wait::until("nothing is left of it", || !begun.exists());
        if setting.target.exists() {
            fs::remove_dir_all(&setting.target).expect("removing");
            return false;
        }
        !status.success()
    });
    assert!(was_cancelled);
    assert_eq!(setting.state(), "resident");
    setting.fixture.mutate();
    setting.session.rollback(setting.fixture.pid());
    setting.fixture.verify("cancelled");
}

#[test]
fn the_files_that_go_back_are_in_the_image() {
    let containers = Containers::new();
    let bundle = containers.script(
        "files",
        "echo kept >/kept; echo other >/dev/shm/other; touch /ready; sleep 100000",
    );
    let id = unique("files");
    let pid = containers.start_with_layer(&id, &bundle);
    let ready = PathBuf::from(format!("/proc/{pid}/root/ready"));
    wait::until("the files are there", || ready.exists());
    let session = &containers.session;
    session.run(&["checkpoint", &id]).expect(DONE, "checkpoint");
    let target = session.scratch().join("image");
    let to = target.to_str().expect("a path in UTF-8");
    session
        .run(&["persist", "--image-path", to, &id])
        .expect(DONE, "persist");
    let opened = Opened::open(&target).expect("an image");
    opened.verify().expect("whole");
    let mut contents = Vec::new();
    for (id, area) in &opened.files {
        for number in 1..=area.contents {
            let id = ObjectId::from_raw(id.raw() + number).expect("an id");
            let mut page = vec![0; 4096];
            let first = Span {
                start: 0,
                end: 4096,
            };
            opened.read(id, &[first], &mut page).expect("its content");
            let end = page
                .iter()
                .rposition(|byte| *byte != 0)
                .map_or(0, |at| at + 1);
            contents.push(String::from_utf8_lossy(&page[..end]).into_owned());
        }
    }
    for content in ["kept\n", "other\n"] {
        assert!(
            contents.iter().any(|found| found == content),
            "{contents:?}"
        );
    }
    let shown = session.run(&["inspect", to]).expect(DONE, "inspect");
    for place in ["included: /,", "included: /dev/shm,"] {
        assert!(shown.out.contains(place), "{}", shown.out);
    }
}
