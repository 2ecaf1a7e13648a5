//! `rebalance`: what would move, and letting it move.

mod apply;
mod input;
mod look;

pub(crate) use look::unmet;

use super::exit::Exit;
use super::global::Global;
use super::patience::{admin, patiently};
use super::render::{self, note};
use crate::error::Result;
use crate::model::admin::RebalanceReply;
use clap::{Args, Subcommand};
use std::io::IsTerminal;
use std::path::PathBuf;

/// Lines of a list that somebody at a terminal wants to see.
const SHOWN: usize = 50;

#[derive(Debug, Subcommand)]
pub(crate) enum RebalanceCommand {
    /// What would move and why, and how even the cluster is before and after; changes nothing.
    ///
    /// Asks the leader of a cluster, or plans for a cluster that is only described (--input).
    #[command(after_long_help = PLAN_HELP)]
    Plan(PlanArgs),
    /// Carries out a plan; asks first.
    ///
    /// A plan is carried out as it was shown, or not at all: when nodes or shards have changed since,
    /// the leader refuses it and nothing happens.
    #[command(after_long_help = APPLY_HELP)]
    Apply(apply::ApplyArgs),
}

const PLAN_HELP: &str = "\
Examples:
  Look, then do exactly that:
    ruvector-cluster rebalance plan
    ruvector-cluster rebalance apply <PLAN>
  What if: a cluster that is only described; no connection is made:
    ruvector-cluster rebalance plan --input cluster.json --output json | jq .ratio

A described cluster:
  {\"replication_factor\": 2, \"max_skew_percent\": 10,
   \"nodes\": [{\"node\": \"n1\", \"rack\": \"a\"}, {\"node\": \"n2\", \"rack\": \"b\", \"weight\": 2},
             {\"node\": \"n3\", \"rack\": \"c\", \"status\": \"draining\"}],
   \"shards\": [{\"shard\": 0, \"replicas\": [\"n1\", \"n3\"], \"load\": 120.5, \"bytes\": 1048576},
              {\"shard\": 1, \"replicas\": [\"n3\", \"n1\"]}]}";

const APPLY_HELP: &str = "\
Examples:
  Plan now, look, and go on:
    ruvector-cluster rebalance apply
  In a script, with somebody else's eyes between plan and deed:
    ruvector-cluster rebalance plan --output json > plan.json
    ruvector-cluster rebalance apply plan.json --yes --wait --timeout 2h";

#[derive(Debug, Args)]
pub(crate) struct PlanArgs {
    /// JSON of a described cluster, `-` for stdin; --help has one.
    #[arg(long, value_name = "FILE")]
    input: Option<PathBuf>,
    /// How far from its share a node may be, in percent of it, instead of what FILE says; 0: within one
    /// replica.
    #[arg(long, value_name = "PERCENT", requires = "input", value_parser = clap::value_parser!(u32).range(0..=100))]
    max_skew: Option<u32>,
}

pub(crate) async fn run(global: &Global, command: RebalanceCommand) -> Result<Exit> {
    match command {
        RebalanceCommand::Plan(PlanArgs { input: Some(path), max_skew }) => {
            let mut described = input::description(&path)?;
            described.max_skew_percent = max_skew.unwrap_or(described.max_skew_percent);
            let plan = crate::planner::plan(&described)?;
            render::show(global.output, &plan, |plan| look::described(plan, shown()))?;
            Ok(Exit::Done)
        }
        RebalanceCommand::Plan(PlanArgs { input: None, .. }) => {
            let client = global.client().await?;
            let reply = patiently(admin(&client).plan()).await?;
            render::show(global.output, &reply, |reply| look::planned(reply, shown()))?;
            if global.output.is_for_people() && !is_nothing(&reply) {
                note(format!("carry it out with: ruvector-cluster rebalance apply {}", reply.id));
            }
            Ok(Exit::Done)
        }
        RebalanceCommand::Apply(args) => apply::run(global, args).await,
    }
}

/// Programs get whole lists.
fn shown() -> usize {
    if std::io::stdout().is_terminal() { SHOWN } else { usize::MAX }
}

/// Whether there is nothing to carry out.
fn is_nothing(reply: &RebalanceReply) -> bool {
    let removals = reply.plan.as_ref().map_or(0, |plan| plan.removals.len());
    reply.moves == 0 && reply.promotions == 0 && removals == 0
}
