//! Images of real programs.

use std::os::unix::fs::PermissionsExt;
use std::sync::mpsc::channel;

use super::tests::Program;
use super::*;
use crate::image::{Durability, Encoding, Opened, Options, Progress, Why, persist};
use crate::memory::{PAGE, Ranges, Span};

/// Compares an image with the shadows that it was written from, page by page.
fn compare(engine: &Engine, name: &str, opened: &Opened) {
    let held = &engine.checkpoints[engine.find(name).unwrap()];
    assert_eq!(opened.spaces.len(), held.spaces.len());
    for image in &held.spaces {
        let stored = &opened.spaces[&image.id];
        assert_eq!(stored.bounds, image.source.bounds().unwrap());
        assert_eq!(stored.auxv, image.source.auxv().unwrap());
        assert_eq!(&stored.guards, image.guards().unwrap());
        let populated = image.populated(&held.context).unwrap();
        let pages = populated.difference(&stored.guards);
        let (mut was, mut is) = (vec![0; 1 << 20], vec![0; 1 << 20]);
        let mut compared = 0;
        for span in pages.pieces(1 << 20) {
            let len = span.len() as usize;
            image.source.read(&[span], &mut was[..len]).unwrap();
            opened.read(image.id, &[span], &mut is[..len]).unwrap();
            assert!(was[..len] == is[..len], "{span:x?}");
            compared += span.len();
        }
        assert!(compared > 0);
        let written: Ranges = opened
            .runs(image.id)
            .iter()
            .map(|run| Span {
                start: run.address,
                end: run.address + u64::from(run.pages) * PAGE,
            })
            .collect();
        assert!(written.difference(&populated).is_empty());
    }
    let mut loaded = Vec::new();
    opened.context.write_out(&mut loaded).unwrap();
    let mut held_bytes = Vec::new();
    held.context.write_out(&mut held_bytes).unwrap();
    assert_eq!(loaded, held_bytes);
    opened.verify().unwrap();
}

#[test]
fn an_image_is_as_the_checkpoint_though_the_tree_runs_on_and_goes_back() {
    let mut program = Program::start();
    let before = program.ask("add 3");
    let mut engine = Engine::attach(Target::of_pid(program.id())).unwrap();
    engine.checkpoint("a").unwrap();
    let directory = tempfile::tempdir().unwrap();
    let target = directory.path().join("image");
    for encoding in [Encoding::Plain, Encoding::Zstd, Encoding::Zstd] {
        let parts = engine.parts("a").unwrap();
        let (tell, told) = channel();
        let to = target.clone();
        let writing = std::thread::spawn(move || {
            let progress = Progress::default();
            tell.send(()).unwrap();
            let options = Options {
                encoding,
                ..Options::default()
            };
            let summary = persist(parts, &to, options, &progress).unwrap();
            let (done, total) = progress.bytes();
            assert_eq!(done, total);
            summary
        });
        told.recv().unwrap();
        loop {
            let is_last = writing.is_finished();
            program.ask("add 5");
            engine
                .rollback("a", RollbackOptions { verify: false })
                .unwrap();
            assert_eq!(program.ask("show"), before);
            if is_last {
                break;
            }
        }
        let summary = writing.join().unwrap();
        assert!(summary.memory_bytes > 32 << 20);
        // The array is one page over and over.
        assert!(summary.image_bytes < summary.memory_bytes / 2);
        let mode = std::fs::metadata(&target).unwrap().permissions().mode();
        assert_eq!(mode & 0o7777, 0o700);
        assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 1);
        compare(&engine, "a", &Opened::open(&target).unwrap());
    }
}

#[test]
fn what_is_cancelled_or_released_leaves_the_image_that_was_there() {
    let mut program = Program::start();
    program.ask("add 3");
    let mut engine = Engine::attach(Target::of_pid(program.id())).unwrap();
    engine.checkpoint("a").unwrap();
    let directory = tempfile::tempdir().unwrap();
    let target = directory.path().join("image");
    let write = |parts, progress: &Progress| persist(parts, &target, Options::default(), progress);
    write(engine.parts("a").unwrap(), &Progress::default()).unwrap();
    let was = std::fs::read(target.join("memory.img")).unwrap();

    let cancelled = Progress::default();
    cancelled.cancel(Why::Unwanted);
    let error = write(engine.parts("a").unwrap(), &cancelled).unwrap_err();
    assert!(
        matches!(error, crate::image::Error::Cancelled(_)),
        "{error}"
    );

    let parts = engine.parts("a").unwrap();
    engine.release(None).unwrap();
    let error = write(parts, &Progress::default()).unwrap_err();
    assert!(!error.to_string().is_empty());
    assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 1);
    assert!(std::fs::read(target.join("memory.img")).unwrap() == was);
    Opened::open(&target).unwrap();
}

/// Of an increment too, which has them not from its shadow.
#[test]
fn memory_policies_are_told() {
    let mut program = Program::start();
    program.ask("add 3");
    let mut engine = Engine::attach(Target::of_pid(program.id())).unwrap();
    engine.checkpoint("before").unwrap();
    program.ask("bind");
    engine.checkpoint("bound").unwrap();
    program.ask("drop");
    program.ask("drop");
    engine.checkpoint("after").unwrap();
    assert!(
        engine.checkpoints[1].spaces[0]
            .source
            .shares_shadow(&engine.checkpoints[2].spaces[0].source)
    );
    let directory = tempfile::tempdir().unwrap();
    let target = directory.path().join("image");
    for (name, is_bound) in [("before", false), ("bound", true), ("after", false)] {
        let options = Options::default();
        engine
            .persist(name, &target, options)
            .unwrap()
            .run()
            .unwrap();
        let opened = Opened::open(&target).unwrap();
        let space = opened.spaces.values().next().unwrap();
        let text = space.policies.as_deref().unwrap_or_default();
        assert_eq!(text.contains("interleave"), is_bound, "{name}: {text}");
    }
}

/// What `fork` has between two containers: no pages that a shadow has, and pages that are kept by copy, be they zero.
#[test]
fn pages_are_lent_as_long_as_the_checkpoint_is_there() {
    let mut program = Program::start();
    program.ask("add 3");
    let mut engine = Engine::attach(Target::of_pid(program.id())).unwrap();
    engine.checkpoint("a").unwrap();
    // Pages of the array are zero again, and in the shadow they are not.
    program.ask("add 248");
    engine.checkpoint("b").unwrap();
    program.ask("add 5");
    let directory = tempfile::tempdir().unwrap();
    let target = directory.path().join("image");
    for name in ["a", "b"] {
        let options = Options {
            lend: true,
            ..Options::default()
        };
        let written = engine.persist(name, &target, options).unwrap().run();
        assert!(written.unwrap().image_bytes < 8 << 20);
        let refused = Opened::open(&target).unwrap_err();
        assert!(matches!(refused, crate::image::Error::Refused(_)));
        let opened = Opened::open_lent(&target).unwrap();
        let held = &engine.checkpoints[engine.find(name).unwrap()];
        let image = &held.spaces[0];
        assert_eq!(opened.runs(image.id).is_empty(), name == "a");
        let pages = opened.pages(image.id);
        let mut reader = pages.reader();
        let (mut zeroes, mut others) = (0, 0);
        let populated = image.populated(&held.context).unwrap();
        let populated = populated.difference(image.guards().unwrap());
        for span in populated.pieces(1 << 20) {
            let (mut was, mut at) = (vec![0; span.len() as usize], span.start);
            image.source.read(&[span], &mut was).unwrap();
            let compare = &mut |part: Span, bytes: Option<&[u8]>| {
                assert_eq!(part.start, at);
                let from = (at - span.start) as usize;
                let was = &was[from..from + part.len() as usize];
                let is = bytes.map_or(vec![0; was.len()], <[u8]>::to_vec);
                assert!(is == was, "{part:x?}");
                at = part.end;
                for page in is.chunks(PAGE as usize) {
                    match page.iter().all(|byte| *byte == 0) {
                        true => zeroes += 1,
                        false => others += 1,
                    }
                }
                Ok(())
            };
            reader.look(span, compare).unwrap();
            assert_eq!(at, span.end);
        }
        assert!(zeroes > 100 && others > 100, "{zeroes}, {others}");
    }
    let opened = Opened::open_lent(&target).unwrap();
    let held = &engine.checkpoints[engine.find("b").unwrap()];
    let id = held.spaces[0].id;
    let populated = held.spaces[0].populated(&held.context).unwrap();
    engine.release(None).unwrap();
    let pages = opened.pages(id);
    let read = |span: &Span| pages.reader().look(*span, &mut |_, _| Ok(()));
    assert!(populated.spans().iter().any(|span| read(span).is_err()));
    assert!(Opened::open_lent(&target).is_err());
}

#[test]
fn other_peoples_directories_are_not_replaced() {
    let mut program = Program::start();
    program.ask("add 3");
    let mut engine = Engine::attach(Target::of_pid(program.id())).unwrap();
    engine.checkpoint("a").unwrap();
    let directory = tempfile::tempdir().unwrap();
    std::fs::write(directory.path().join("letter"), "dear").unwrap();
    let parts = engine.parts("a").unwrap();
    let ended = persist(
        parts,
        directory.path(),
        Options::default(),
        &Progress::default(),
    );
    match ended {
        Err(crate::image::Error::Refused(refusal)) => {
            assert!(refusal.remedy.contains("empty"), "{refusal}")
        }
        other => panic!("{other:?}"),
    }
    assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 1);

    // What somebody has laid there to look into it later.
    let target = directory.path().join("image");
    let staging = directory.path().join(".image.persisting");
    std::fs::create_dir(&staging).unwrap();
    for (owner, mode) in [(1000, 0o700), (0, 0o755)] {
        std::os::unix::fs::chown(&staging, Some(owner), None).unwrap();
        let permissions = std::fs::Permissions::from_mode(mode);
        std::fs::set_permissions(&staging, permissions).unwrap();
        let parts = engine.parts("a").unwrap();
        let ended = persist(parts, &target, Options::default(), &Progress::default());
        assert!(
            matches!(ended, Err(crate::image::Error::Refused(_))),
            "{ended:?}"
        );
        assert!(!target.exists());
    }
}

#[test]
fn what_is_on_disk_is_told() {
    let mut program = Program::start();
    program.ask("add 3");
    let mut engine = Engine::attach(Target::of_pid(program.id())).unwrap();
    engine.checkpoint("a").unwrap();
    let directory = tempfile::tempdir().unwrap();
    let target = directory.path().join("image");
    let told = |engine: &Engine| engine.checkpoints()[0].durability.clone();
    let durable = Durability::Durable { at: target.clone() };
    assert_eq!(told(&engine), Durability::Resident);
    let begin = |engine: &mut Engine| engine.persist("a", &target, Options::default()).unwrap();
    let persisting = begin(&mut engine);
    assert!(matches!(
        told(&engine),
        Durability::Persisting { done: 0, .. }
    ));
    persisting.run().unwrap();
    assert_eq!(told(&engine), durable);
    // One that comes to nothing takes nothing away.
    drop(begin(&mut engine));
    assert_eq!(told(&engine), durable);
    let cancelled = begin(&mut engine);
    cancelled.progress().cancel(Why::Unwanted);
    cancelled.run().unwrap_err();
    assert_eq!(told(&engine), durable);
    // Another of the same name is another.
    let replaced = begin(&mut engine);
    engine.checkpoint("a").unwrap();
    assert_eq!(replaced.progress().cancelled(), Some(Why::Released));
    assert!(matches!(
        replaced.run(),
        Err(crate::image::Error::Cancelled(_))
    ));
    assert_eq!(told(&engine), Durability::Resident);
}

/// As `fixtures/images` was made: of a program that is on every machine, in no one's cgroup, without an environment.
#[test]
#[ignore = "writes fixtures/images anew, after a change of the format"]
fn write_the_images() {
    let mut program = std::process::Command::new("/usr/bin/sleep")
        .arg("1000")
        .env_clear()
        .env("A", "b")
        .current_dir("/")
        .stdin(std::process::Stdio::null())
        .stdout(std::process::Stdio::null())
        .stderr(std::process::Stdio::null())
        .spawn()
        .unwrap();
    let pid = program.id() as i32;
    for hierarchy in std::fs::read_dir("/sys/fs/cgroup").unwrap().flatten() {
        let procs = hierarchy.path().join("cgroup.procs");
        let _ = std::fs::write(procs, pid.to_string());
    }
    let mut engine = Engine::attach(Target::of_pid(pid)).unwrap();
    engine.checkpoint("golden").unwrap();
    let images = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/images");
    for (name, encoding) in [("v1-plain", Encoding::Plain), ("v1-zstd", Encoding::Zstd)] {
        let options = Options {
            encoding,
            ..Options::default()
        };
        let persisting = engine.persist("golden", &images.join(name), options);
        persisting.unwrap().run().unwrap();
    }
    engine.release(None).unwrap();
    program.kill().unwrap();
    program.wait().unwrap();
}
