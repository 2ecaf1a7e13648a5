//! JSON that operators give to `rebalance`.

use crate::error::{Error, Result};
use crate::model::plan::ClusterDescription;
use std::fs::File;
use std::io::Read;
use std::path::Path;

/// The largest cluster there can be is described in a fraction of this.
const MOST_BYTES: u64 = 256 << 20;

/// A described cluster.
///
/// # Errors
/// `Invalid` that names the file, and line and column of what is wrong in it.
pub(super) fn description(path: &Path) -> Result<ClusterDescription> {
    let (name, text) = read(path)?;
    parse(&name, &text)
}

fn parse(name: &str, text: &str) -> Result<ClusterDescription> {
    serde_json::from_str(text).map_err(|e| Error::Invalid(format!("{name} does not describe a cluster: {e}")))
}

/// A file as text, or stdin for `-`, and what to call it.
pub(super) fn read(path: &Path) -> Result<(String, String)> {
    let (name, input): (_, Box<dyn Read>) = if path.as_os_str() == "-" {
        ("stdin".to_owned(), Box::new(std::io::stdin()))
    } else {
        let name = path.display().to_string();
        let file = File::open(path).map_err(|e| Error::Invalid(format!("cannot open {name}: {e}")))?;
        (name, Box::new(file))
    };
    let mut text = String::new();
    let read = input.take(MOST_BYTES + 1).read_to_string(&mut text);
    let read = read.map_err(|e| Error::Invalid(format!("cannot read {name}: {e}")))?;
    if read as u64 > MOST_BYTES {
        return Err(Error::Invalid(format!("{name} has more than {} MiB", MOST_BYTES >> 20)));
    }
    Ok((name, text))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::records::NodeStatus;

    #[test]
    fn a_description_needs_little() {
        let text = r#"{"replication_factor": 2, "nodes": [{"node": "n1"}], "shards": [{"shard": 0}]}"#;
        let described = parse("x", text).unwrap();
        assert_eq!((described.nodes[0].weight, described.nodes[0].status), (1, NodeStatus::Up));
        assert_eq!((described.max_skew_percent, described.migrations_per_node), (0, 2));
    }

    #[test]
    fn what_is_wrong_is_told_by_line_and_column() {
        for (text, words) in [
            ("{\n  \"replication_factor\": 2,\n  \"nodes\": 3}", "at line 3 column 12"),
            ("{\"nodes\": []}", "missing field `replication_factor` at line 1 column 13"),
            ("", "at line 1 column 0"),
        ] {
            let error = parse("c.json", text).unwrap_err().to_string();
            assert!(
                error.starts_with("c.json does not describe a cluster: ") && error.contains(words),
                "{error}"
            );
        }
        let error = description(Path::new("/nowhere/c.json")).unwrap_err();
        assert!(
            matches!(&error, Error::Invalid(text) if text.contains("cannot open /nowhere/c.json")),
            "{error}"
        );
    }
}
