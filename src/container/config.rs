//! The bundle's `config.json`.

/// The configuration `spec` writes: what `runc spec` writes, with `sh` on a terminal in new PID, network, IPC, UTS
/// and mount namespaces.
pub const DEFAULT: &str = include_str!("default_config.json");

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn default_is_a_valid_specification() {
        let spec: oci_spec::runtime::Spec = serde_json::from_str(DEFAULT).unwrap();
        assert_eq!(
            spec.process().as_ref().unwrap().args().as_deref(),
            Some(&["sh".to_owned()][..])
        );
    }
}
