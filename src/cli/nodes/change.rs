//! `nodes maintenance` and `nodes set`: what an operator may change of a node.

use super::show::what;
use crate::cli::exit::Exit;
use crate::cli::global::{Global, Output};
use crate::cli::patience::{admin, patiently};
use crate::cli::render::{self, facts, note, plain};
use crate::clock::wall;
use crate::error::Result;
use crate::model::NodeId;
use crate::model::admin::{MAX_MAINTENANCE_MS, MaintenanceRequest, NodeReply, SetNodeRequest};
use crate::model::ids::validate_name;
use crate::model::records::{MAX_REASON_BYTES, MAX_WEIGHT};
use clap::{ArgGroup, Args, Subcommand};

#[derive(Debug, Subcommand)]
pub(crate) enum MaintenanceCommand {
    /// Begins it, or changes its reason and its end.
    ///
    /// While it lasts, the replicas of the node are not rebuilt elsewhere, even if it is down. It ends by
    /// itself, so a node that is forgotten is replaced after all.
    #[command(after_long_help = "\
Example:
  ruvector-cluster nodes maintenance on n2 --reason 'kernel update' --for 1h")]
    On(OnArgs),
    /// Ends it: a node that is away now is replaced as usual.
    Off {
        /// As in `nodes ls`.
        node: NodeId,
    },
}

#[derive(Debug, Args)]
pub(crate) struct OnArgs {
    /// As in `nodes ls`.
    node: NodeId,
    /// Why, for whoever wonders.
    #[arg(long, value_name = "TEXT", value_parser = reason)]
    reason: String,
    /// How long at the most, up to 14days: 30m, 1h, 2days.
    #[arg(long = "for", value_name = "TIME", value_parser = for_ms)]
    for_ms: u64,
}

#[derive(Debug, Args)]
#[command(group(ArgGroup::new("change").required(true).multiple(true).args(["weight", "rack"])))]
pub(crate) struct SetArgs {
    /// As in `nodes ls`.
    node: NodeId,
    /// Its share of replicas relative to other nodes.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=i64::from(MAX_WEIGHT)))]
    weight: Option<u32>,
    /// Its failure domain; empty: one of its own.
    #[arg(long, value_name = "RACK", value_parser = rack)]
    rack: Option<String>,
}

fn reason(text: &str) -> Result<String, String> {
    match text.trim() {
        "" => Err("say why, for whoever wonders".to_owned()),
        text if text.len() > MAX_REASON_BYTES => {
            Err(format!("it has {} bytes, use up to {MAX_REASON_BYTES}", text.len()))
        }
        text => Ok(text.to_owned()),
    }
}

fn for_ms(text: &str) -> Result<u64, String> {
    let time = humantime::parse_duration(text).map_err(|e| e.to_string())?;
    match u64::try_from(time.as_millis()) {
        Ok(0) => Err("use at least 1ms".to_owned()),
        Ok(ms) if ms <= MAX_MAINTENANCE_MS => Ok(ms),
        _ => Err("use up to 14days: a node that is away for longer had better be drained".to_owned()),
    }
}

fn rack(text: &str) -> Result<String> {
    if !text.is_empty() {
        validate_name("rack", text)?;
    }
    Ok(text.to_owned())
}

pub(super) async fn maintenance(global: &Global, command: MaintenanceCommand) -> Result<Exit> {
    let request = match command {
        MaintenanceCommand::On(OnArgs { node, reason, for_ms }) => {
            MaintenanceRequest { node, on: true, reason, for_ms }
        }
        MaintenanceCommand::Off { node } => {
            MaintenanceRequest { node, on: false, reason: String::new(), for_ms: 0 }
        }
    };
    let client = global.client().await?;
    let reply = patiently(admin(&client).maintenance(&request)).await?;
    show(global, &reply)?;
    if request.on && global.output == Output::Table {
        note(format!("end it with: ruvector-cluster nodes maintenance off {}", request.node));
    }
    Ok(Exit::Done)
}

pub(super) async fn set(global: &Global, args: SetArgs) -> Result<Exit> {
    let request = SetNodeRequest { node: args.node, weight: args.weight, rack: args.rack };
    let client = global.client().await?;
    let reply = patiently(admin(&client).set_node(&request)).await?;
    show(global, &reply)?;
    if global.output == Output::Table {
        note("see what follows from it with: ruvector-cluster rebalance plan");
    }
    Ok(Exit::Done)
}

pub(super) async fn forget(global: &Global, node: &str) -> Result<Exit> {
    let client = global.client().await?;
    let reply = patiently(admin(&client).forget(node)).await?;
    render::show(global.output, &reply, |reply| format!("{} is forgotten", plain(&reply.record.node)))?;
    if global.output == Output::Table {
        note("should it come back, it joins like a new node; its disk can go");
    }
    Ok(Exit::Done)
}

fn show(global: &Global, reply: &NodeReply) -> Result<()> {
    render::show(global.output, reply, |reply| facts(what(&reply.record, wall()))).map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_maintenance_has_a_reason_and_an_end_within_bounds() {
        assert_eq!(for_ms("1h"), Ok(3_600_000));
        assert_eq!(for_ms("14days"), Ok(MAX_MAINTENANCE_MS));
        for text in ["0s", "15days", "soon", "1", "9999999years"] {
            assert!(for_ms(text).is_err(), "{text}");
        }
        assert_eq!(reason(" disk "), Ok("disk".to_owned()));
        assert!(reason("  ").is_err() && reason(&"x".repeat(MAX_REASON_BYTES + 1)).is_err());
    }

    #[test]
    fn a_rack_is_a_name_or_nothing() {
        assert!(rack("").is_ok() && rack("a-1").is_ok());
        assert!(rack("a.1").is_err());
    }
}
