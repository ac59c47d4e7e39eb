use super::*;

fn write_state(root: &Path, id: &str, status: ContainerStatus, pid: Option<i32>) {
    let directory = root.join(id);
    fs::create_dir_all(&directory).unwrap();
    State::new(id, status, pid, "/bundle".into())
        .save(&directory)
        .unwrap();
}

#[test]
fn ids_are_one_path_component() {
    for good in ["a", "redis-1", "a.b_c+d", "..."] {
        assert!(check_id(good).is_ok(), "{good}");
    }
    for bad in ["", ".", "..", "a/b", "../x", "a b", "ä", "a\n"] {
        assert!(
            matches!(check_id(bad), Err(Error::InvalidId { .. })),
            "{bad:?}"
        );
    }
}

#[test]
fn unknown_and_unreadable_states_are_told_apart() {
    let root = tempfile::tempdir().unwrap();
    assert!(matches!(
        locate(root.path(), "none"),
        Err(Error::Unknown { .. })
    ));
    fs::create_dir(root.path().join("bad")).unwrap();
    fs::write(root.path().join("bad/state.json"), "{\"id\": 1}").unwrap();
    assert!(matches!(
        locate(root.path(), "bad"),
        Err(Error::BadState { .. })
    ));
    fs::write(root.path().join("bad/state.json"), "").unwrap();
    assert!(matches!(
        locate(root.path(), "bad"),
        Err(Error::BadState { .. })
    ));
    fs::write(root.path().join("file"), "").unwrap();
    assert!(matches!(
        locate(root.path(), "file"),
        Err(Error::Unknown { .. })
    ));
}

#[test]
fn a_reused_pid_is_not_the_init() {
    let root = tempfile::tempdir().unwrap();
    let me = std::process::id().cast_signed();
    write_state(root.path(), "c", ContainerStatus::Running, Some(me));
    let start_time = alive_since(me).unwrap();
    let directory = root.path().join("c");

    Init {
        start_time,
        cgroup: "/snapback/c".into(),
        rootfs: "/r".into(),
        overlay: None,
    }
    .save(&directory)
    .unwrap();
    let found = locate(root.path(), "c").unwrap();
    assert_eq!(
        (found.status, found.init),
        (Status::Running, Some(Pid::from_raw(me)))
    );
    assert_eq!(found.running().unwrap(), Pid::from_raw(me));

    Init {
        start_time: start_time + 1,
        cgroup: "/snapback/c".into(),
        rootfs: "/r".into(),
        overlay: None,
    }
    .save(&directory)
    .unwrap();
    let found = locate(root.path(), "c").unwrap();
    assert_eq!((found.status, found.init), (Status::Stopped, None));
    assert!(matches!(
        found.running(),
        Err(Error::WrongStatus {
            status: Status::Stopped,
            ..
        })
    ));
}

#[test]
fn a_container_that_is_being_started_is_seen_when_it_has_been() {
    let root = tempfile::tempdir().unwrap();
    write_state(root.path(), "d", ContainerStatus::Created, None);
    let starting = Starting::begin(&root.path().join("d")).unwrap();
    let seen = std::thread::scope(|scope| {
        let seen = scope.spawn(|| locate(root.path(), "d").unwrap().state.status);
        while !waits_for_a_lock() {
            assert!(!seen.is_finished());
            std::thread::yield_now();
        }
        write_state(root.path(), "d", ContainerStatus::Running, None);
        drop(starting);
        seen.join().unwrap()
    });
    assert_eq!(seen, ContainerStatus::Running);
}

/// Whether a thread of this process is blocked in flock(2).
fn waits_for_a_lock() -> bool {
    let tasks = fs::read_dir("/proc/self/task").unwrap().flatten();
    let mut calls = tasks.filter_map(|task| fs::read_to_string(task.path().join("syscall")).ok());
    calls.any(|call| call.starts_with(&format!("{} ", libc::SYS_flock)))
}

#[test]
fn list_skips_what_is_no_container() {
    let root = tempfile::tempdir().unwrap();
    write_state(root.path(), "b", ContainerStatus::Created, None);
    write_state(root.path(), "a", ContainerStatus::Creating, None);
    fs::create_dir(root.path().join("directory")).unwrap();
    fs::write(root.path().join("socket"), "").unwrap();
    let found: Vec<_> = list(root.path())
        .unwrap()
        .into_iter()
        .map(|found| found.unwrap())
        .collect();
    let told: Vec<_> = found
        .iter()
        .map(|found| (found.id.as_str(), found.status))
        .collect();
    assert_eq!(told, [("a", Status::Creating), ("b", Status::Stopped)]);
    assert!(list(&root.path().join("missing")).unwrap().is_empty());
}
