//! Trees of checkpoints of real programs.

use std::collections::BTreeMap;

use super::tests::Program;
use super::*;

/// Numbers without an order, the same every time.
struct Dice(u64);

impl Dice {
    fn below(&mut self, most: usize) -> usize {
        self.0 = self
            .0
            .wrapping_mul(6364136223846793005)
            .wrapping_add(1442695040888963407);
        (self.0 >> 33) as usize % most
    }
}

const VERIFY: RollbackOptions = RollbackOptions { verify: true };

fn pages_kept(engine: &Engine) -> u64 {
    let spaces = engine.spaces.values();
    spaces.map(|space| space.page_store().bytes()).sum()
}

fn shadows(engine: &Engine) -> usize {
    let images = engine.checkpoints.iter().flat_map(|held| &held.spaces);
    let pids = images
        .filter_map(|image| image.source.shadow())
        .map(|shadow| shadow.pid);
    pids.collect::<std::collections::BTreeSet<_>>().len()
}

#[test]
fn a_tree_is_walked_in_any_order() {
    let mut program = Program::start();
    program.ask("show");
    let mut engine = Engine::attach(Target::of_pid(program.id())).unwrap();
    let mut dice = Dice(7);
    let mut states = BTreeMap::new();
    for turn in 0..80 {
        let name = format!("c{turn}");
        // A few pages, new mappings, and mappings that go.
        let asked = ["add 1", "add 2", "drop 1", "forget"][dice.below(4)];
        program.ask(asked);
        states.insert(name.clone(), program.ask("show"));
        let report = engine.take(&name).unwrap();
        assert!(turn == 0 || report.dirty_pages < 6000, "{report:?}");
        if dice.below(3) == 0 {
            let names: Vec<&String> = states.keys().collect();
            let to = names[dice.below(names.len())].clone();
            program.ask("add 9");
            engine.rollback(&to, VERIFY).unwrap();
            assert_eq!(program.ask("show"), states[&to], "{to}");
        }
        if dice.below(4) == 0 {
            let names: Vec<&String> = states.keys().collect();
            let gone = names[dice.below(names.len())].clone();
            states.remove(&gone);
            engine.release(Some(&gone)).unwrap();
        }
    }
    assert!(shadows(&engine) <= 3, "{}", shadows(&engine));
    for (name, state) in &states {
        engine.rollback(name, VERIFY).unwrap();
        assert_eq!(&program.ask("show"), state, "{name}");
    }
    let kept = pages_kept(&engine);
    assert!(kept > 0);
    let names: Vec<String> = states.keys().cloned().collect();
    for name in &names {
        engine.release(Some(name)).unwrap();
    }
    assert_eq!(pages_kept(&engine), 0);
    let maps = std::fs::read_to_string(format!("/proc/{}/maps", program.id())).unwrap();
    assert!(!maps.contains("snapback"));
}

#[test]
fn a_release_gives_back_what_only_it_needed() {
    let mut program = Program::start();
    program.ask("show");
    let mut engine = Engine::attach(Target::of_pid(program.id())).unwrap();
    engine.take("a").unwrap();
    program.ask("add 1");
    engine.take("b").unwrap();
    let state = program.ask("show");
    let of_b = pages_kept(&engine);
    program.ask("add 1");
    let report = engine.take("c").unwrap();
    let both = pages_kept(&engine);
    // Pages that went since are not kept any more.
    assert!(both - of_b <= report.copied_bytes && both - of_b > report.copied_bytes / 2);
    // What c has written again is b's alone, the rest is needed by c.
    engine.release(Some("b")).unwrap();
    let left = pages_kept(&engine);
    assert!(left < both && left >= both - of_b, "{left} of {both}");
    let parents: Vec<_> = engine
        .checkpoints()
        .into_iter()
        .map(|info| info.parent)
        .collect();
    assert_eq!(parents, [None, Some("a".to_owned())]);
    engine.rollback("a", VERIFY).unwrap();
    engine.rollback("c", VERIFY).unwrap();
    assert_ne!(program.ask("show"), state);
    engine.release(Some("c")).unwrap();
    assert_eq!(pages_kept(&engine), 0);
    // It was equal to c last.
    program.ask("add 1");
    let state = program.ask("show");
    engine.take("d").unwrap();
    program.ask("add 1");
    for name in ["a", "d", "a", "d"] {
        engine.rollback(name, VERIFY).unwrap();
    }
    assert_eq!(program.ask("show"), state);
    // The shadow of a is needed without it.
    engine.release(Some("a")).unwrap();
    assert_eq!(shadows(&engine), 1);
    program.ask("add 1");
    engine.rollback("d", VERIFY).unwrap();
    assert_eq!(program.ask("show"), state);
}

#[test]
fn the_oldest_go_but_for_the_pinned() {
    let mut program = Program::start();
    program.ask("show");
    let mut engine = Engine::attach(Target::of_pid(program.id())).unwrap();
    let names = |engine: &Engine| -> Vec<String> {
        engine
            .checkpoints()
            .into_iter()
            .map(|info| info.name)
            .collect()
    };
    let pin = TakeOptions {
        pin: true,
        ..TakeOptions::default()
    };
    let keep = TakeOptions {
        keep: Some(2),
        ..TakeOptions::default()
    };
    engine.take("a").unwrap();
    engine.take_with("b", pin).unwrap();
    let state = program.ask("show");
    for name in ["c", "d", "e"] {
        program.ask("add 1");
        engine.take_with(name, keep).unwrap();
    }
    assert_eq!(names(&engine), ["b", "d", "e"]);
    let most = engine.kept_bytes();
    program.ask("add 1");
    let limit = TakeOptions {
        max_bytes: Some(most),
        ..TakeOptions::default()
    };
    engine.take_with("f", limit).unwrap();
    let left = names(&engine);
    assert!(
        left.len() < 4 && left[0] == "b" && left.contains(&"f".to_owned()),
        "{left:?}"
    );
    assert!(engine.kept_bytes() <= most);
    engine
        .take_with(
            "g",
            TakeOptions {
                max_bytes: Some(1),
                ..limit
            },
        )
        .unwrap();
    assert_eq!(names(&engine), ["b", "g"]);
    engine.rollback("b", VERIFY).unwrap();
    assert_eq!(program.ask("show"), state);
}
