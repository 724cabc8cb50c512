//! VM definitions: one TOML file per VM on each host, written by the host's operator, never sent over the wire.

use std::path::{Path, PathBuf};

use serde::Deserialize;

use crate::{
    files::{self, MAX_CONFIG},
    network::Mac,
};

/// Replaced by the options that make QEMU wait for a migration.
const INCOMING: &str = "{incoming}";

/// A VM as this host knows it.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VmDefinition {
    /// Name, the same on both hosts.
    pub name: String,
    /// The QMP socket of the VM's QEMU on this host.
    pub qmp: PathBuf,
    /// How this host starts it: program and arguments. The element `{incoming}` is replaced by what makes QEMU
    /// wait for a migration; without one it is appended. Without a command a waiting QEMU must be there already.
    pub command: Option<Vec<String>>,
    /// NICs to announce after a cutover; found through QEMU when empty.
    #[serde(default)]
    pub nics: Vec<NicDefinition>,
}

/// One NIC of a VM.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct NicDefinition {
    /// Ethernet address.
    pub mac: Mac,
    /// Interface of this host from which to announce it: the uplink's bridge port or NIC.
    pub announce_on: Option<String>,
}

/// Why a VM's definition cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum DefinitionError {
    /// No file.
    #[error("no VM {name:?} is defined on this host: {} does not exist{known}", path.display())]
    Unknown {
        /// The VM.
        name: String,
        /// Where its definition should be.
        path: PathBuf,
        /// The ones that are.
        known: String,
    },
    /// A name that cannot be a file name.
    #[error("{0:?} is not a VM name: use letters, digits, '-', '_' and '.', not beginning with '.'")]
    BadName(String),
    /// The file cannot be read.
    #[error("cannot read {}: {source}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why not.
        source: std::io::Error,
    },
    /// The file's content is wrong.
    #[error("{}: {problem}", path.display())]
    Invalid {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        problem: String,
    },
}

impl VmDefinition {
    /// Reads `directory/name.toml`.
    ///
    /// # Errors
    /// [`DefinitionError`].
    pub fn read(directory: &Path, name: &str) -> Result<Self, DefinitionError> {
        let allowed = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
        if name.is_empty() || name.len() > 128 || name.starts_with('.') || !name.chars().all(allowed) {
            return Err(DefinitionError::BadName(name.to_owned()));
        }
        let path = directory.join(format!("{name}.toml"));
        let failed = |source| DefinitionError::Read { path: path.clone(), source };
        let text = match files::read_text(&path, MAX_CONFIG) {
            Ok(text) => text,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                return Err(DefinitionError::Unknown {
                    name: name.to_owned(),
                    known: known(directory),
                    path,
                });
            }
            Err(error) => return Err(failed(error)),
        };
        Self::parse(&text, name).map_err(|problem| DefinitionError::Invalid { path, problem })
    }

    /// Reads a definition's text; `name` is what its file is called.
    ///
    /// # Errors
    /// A sentence about what is wrong.
    pub fn parse(text: &str, name: &str) -> Result<Self, String> {
        let definition: Self = toml::from_str(text).map_err(|error| error.to_string())?;
        if definition.name != name {
            return Err(format!("name is {:?}, but the file is called {name}.toml", definition.name));
        }
        if !definition.qmp.is_absolute() {
            return Err(format!("qmp must be an absolute path, not {}", definition.qmp.display()));
        }
        if definition.command.as_ref().is_some_and(Vec::is_empty) {
            return Err("command is empty: give program and arguments, or leave it out".into());
        }
        Ok(definition)
    }

    /// Whether QEMU takes all of its RAM as soon as it starts.
    pub fn preallocates(&self) -> bool {
        let hints = ["prealloc=on", "prealloc=yes", "prealloc=true", "-mem-prealloc"];
        let command = self.command.as_deref().unwrap_or_default();
        command.iter().any(|argument| hints.iter().any(|hint| argument.contains(hint)))
    }

    /// The command that starts the VM waiting for a migration, stopped: program and arguments.
    pub fn incoming_command(&self) -> Option<Vec<String>> {
        let options = ["-incoming", "defer", "-S"].map(str::to_owned);
        let command = self.command.as_ref()?;
        let mut out = Vec::with_capacity(command.len() + options.len());
        if command.iter().any(|argument| argument == INCOMING) {
            for argument in command {
                if argument == INCOMING {
                    out.extend(options.clone());
                } else {
                    out.push(argument.clone());
                }
            }
        } else {
            out.extend(command.iter().cloned());
            out.extend(options);
        }
        Some(out)
    }
}

fn known(directory: &Path) -> String {
    let mut names: Vec<String> = std::fs::read_dir(directory)
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|entry| Some(entry.file_name().to_str()?.strip_suffix(".toml")?.to_owned()))
        .collect();
    names.sort();
    if names.is_empty() {
        "; no VM is defined there".into()
    } else {
        format!("; defined are: {}", names.join(", "))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const GOOD: &str = r#"
name = "web"
qmp = "/run/web.qmp"
command = ["qemu-system-x86_64", "-m", "1G"]
nics = [{ mac = "52:54:00:00:00:01", announce-on = "eno1" }, { mac = "52:54:00:00:00:02" }]
"#;

    #[test]
    fn reads_a_definition() {
        let vm = VmDefinition::parse(GOOD, "web").unwrap();
        assert_eq!(vm.nics[0].announce_on.as_deref(), Some("eno1"));
        let command = vm.incoming_command().unwrap();
        assert_eq!(command[3..], ["-incoming", "defer", "-S"]);
        assert!(!vm.preallocates());
        let early = GOOD.replace("\"1G\"", "\"1G\", \"-object\", \"memory-backend-file,id=ram,prealloc=on\"");
        assert!(VmDefinition::parse(&early, "web").unwrap().preallocates());
    }

    #[test]
    fn the_example_is_one() {
        const EXAMPLE: &str = include_str!("../../../packaging/vms/web.toml");
        let vm = VmDefinition::parse(EXAMPLE, "web").unwrap();
        let command = vm.command.unwrap();
        assert!(vm.nics.is_empty() && command.iter().any(|argument| argument.contains("share=on")));
        assert!(command.iter().any(|argument| argument.contains(vm.qmp.to_str().unwrap())));
        let nics = EXAMPLE.replace("# nics", "nics");
        assert!(VmDefinition::parse(&nics, "web").unwrap().nics[0].announce_on.is_some());
    }

    #[test]
    fn placeholder_decides_where_incoming_goes() {
        let text = GOOD.replace(r#""-m", "1G"]"#, r#""{incoming}", "-m", "1G"]"#);
        let command = VmDefinition::parse(&text, "web").unwrap().incoming_command().unwrap();
        assert_eq!(command, ["qemu-system-x86_64", "-incoming", "defer", "-S", "-m", "1G"]);
    }

    #[test]
    fn mistakes_are_named() {
        let problem = |from: &str, to: &str| VmDefinition::parse(&GOOD.replace(from, to), "web").unwrap_err();
        assert!(problem("name = \"web\"", "name = \"db\"").contains("web.toml"));
        assert!(problem("/run/", "run/").contains("absolute"));
        assert!(problem("52:54:00:00:00:01", "52:54").contains("not an Ethernet address"));
        assert!(problem("qmp =", "qpm =").contains("qpm"));
        assert!(problem(r#"["qemu-system-x86_64", "-m", "1G"]"#, "[]").contains("empty"));
    }

    #[test]
    fn names_cannot_leave_the_directory() {
        for name in ["", "..", "../etc/passwd", "a/b", ".hidden", "a b"] {
            let error = VmDefinition::read(Path::new("/nonexistent"), name).unwrap_err();
            assert!(matches!(error, DefinitionError::BadName(_)), "{name}");
        }
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("web.toml"), GOOD).unwrap();
        let error = VmDefinition::read(dir.path(), "wbe").unwrap_err().to_string();
        assert!(error.contains("defined are: web"), "{error}");
    }

    /// As an operator may write it: strings as TOML quotes them.
    fn text(vm: &VmDefinition) -> String {
        let quoted = |text: &str| toml::Value::from(text).to_string();
        let mut text =
            format!("name = {}\nqmp = {}\n", quoted(&vm.name), quoted(&vm.qmp.display().to_string()));
        if let Some(command) = &vm.command {
            let arguments: Vec<String> = command.iter().map(|argument| quoted(argument)).collect();
            text += &format!("command = [{}]\n", arguments.join(", "));
        }
        for nic in &vm.nics {
            text += &format!("[[nics]]\nmac = \"{}\"\n", nic.mac);
            if let Some(uplink) = &nic.announce_on {
                text += &format!("announce-on = {}\n", quoted(uplink));
            }
        }
        text
    }

    fn definitions() -> impl Strategy<Value = VmDefinition> {
        use proptest::{collection::vec, option};
        let nic = (any::<[u8; 6]>(), option::of(".{0,12}"))
            .prop_map(|(mac, announce_on)| NicDefinition { mac: Mac(mac), announce_on });
        ("[a-z0-9.-]{1,12}", "/.{0,20}", option::of(vec(".{0,20}", 1..5)), vec(nic, 0..4))
            .prop_map(|(name, qmp, command, nics)| VmDefinition { name, qmp: qmp.into(), command, nics })
    }

    proptest! {
        #![proptest_config(crate::fuzzing::at_most(64))]

        #[test]
        fn definitions_are_read_as_they_were_written(vm in definitions()) {
            prop_assert_eq!(VmDefinition::parse(&text(&vm), &vm.name), Ok(vm));
        }

        #[test]
        fn arbitrary_text_never_panics(text in ".{0,200}") {
            let _ = VmDefinition::parse(&text, "web");
        }
    }
}
