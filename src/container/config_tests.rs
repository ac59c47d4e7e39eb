use serde_json::{Value, json};

use super::*;

fn bundle(change: impl FnOnce(&mut Value)) -> tempfile::TempDir {
    let directory = tempfile::tempdir().unwrap();
    fs::create_dir(directory.path().join("rootfs")).unwrap();
    let mut config: Value = serde_json::from_str(DEFAULT).unwrap();
    change(&mut config);
    fs::write(directory.path().join("config.json"), config.to_string()).unwrap();
    directory
}

#[test]
fn cgroup_defaults_to_the_containers_own() {
    let directory = bundle(|_| ());
    let found = Bundle::load(directory.path(), "c1").unwrap();
    assert_eq!(found.cgroup, Path::new("/snapback/c1"));
    assert!(!found.as_written && found.has_new_network());
    assert!(found.spec.root().as_ref().unwrap().path().is_absolute());
}

#[test]
fn what_needs_no_change_is_used_as_written() {
    let directory = bundle(|config| config["linux"]["cgroupsPath"] = json!("/machine/x"));
    let found = Bundle::load(directory.path(), "c1").unwrap();
    assert_eq!(found.cgroup, Path::new("/machine/x"));
    assert!(found.as_written);
}

#[test]
fn false_no_new_privileges_is_left_out() {
    let directory = bundle(|config| config["process"]["noNewPrivileges"] = json!(false));
    let found = Bundle::load(directory.path(), "c1").unwrap();
    assert_eq!(
        found.spec.process().as_ref().unwrap().no_new_privileges(),
        None
    );
}

#[test]
fn a_stand_in_has_the_explicit_configuration_and_the_other_files() {
    let directory = bundle(|_| ());
    fs::write(directory.path().join("extra"), "x").unwrap();
    let found = Bundle::load(directory.path(), "c1").unwrap();
    let place = tempfile::tempdir().unwrap();
    let stand_in = place.path().join("bundle");
    found.write_stand_in(&stand_in).unwrap();
    assert_eq!(fs::read(stand_in.join("extra")).unwrap(), b"x");
    let again = Bundle::load(&stand_in, "c2").unwrap();
    assert_eq!((again.cgroup, again.as_written), (found.cgroup, true));
}

#[test]
fn what_makes_no_sense_is_told_with_the_file() {
    let cases = [
        ("process is missing", "/process", Value::Null),
        ("linux is missing", "/linux", Value::Null),
        ("process.args is empty", "/process/args", json!([])),
        ("leads upwards", "/linux/cgroupsPath", json!("/a/../b")),
        ("opening the root directory", "/root/path", json!("missing")),
    ];
    for (expected, place, value) in cases {
        let directory = bundle(|config| {
            config["linux"]["cgroupsPath"] = json!("/a");
            *config.pointer_mut(place).unwrap() = value;
        });
        let error = Bundle::load(directory.path(), "c1")
            .unwrap_err()
            .to_string();
        assert!(error.contains(expected), "{error}");
    }
    let directory = bundle(|_| ());
    fs::write(directory.path().join("config.json"), "{").unwrap();
    assert!(matches!(
        Bundle::load(directory.path(), "c1"),
        Err(Error::Config { .. })
    ));
    assert!(matches!(
        Bundle::load(Path::new("/nonexistent"), "c1"),
        Err(Error::Io { .. })
    ));
}
