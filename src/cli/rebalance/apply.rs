//! `rebalance apply`: carrying out a plan, and following it.

use super::{input, is_nothing, look, shown};
use crate::cli::confirm::{confirmed, possible};
use crate::cli::exit::Exit;
use crate::cli::follow::{Change, Follow, MigrationBars, outcome};
use crate::cli::global::{Global, Output};
use crate::cli::interrupt::Interrupts;
use crate::cli::patience::{AWAY, admin, deadline, patiently};
use crate::cli::render::{self, count, note, plain, put, span};
use crate::client::Client;
use crate::error::{Error, Result};
use crate::model::admin::RebalanceReply;
use crate::model::ids::validate_name;
use clap::Args;
use std::collections::BTreeSet;
use std::path::Path;
use std::time::Duration;
use tokio::time::Instant;

const LOOK: Duration = Duration::from_secs(1);
/// Longer than the leader waits before it tries a migration again.
const STALLED: Duration = Duration::from_secs(120);

#[derive(Debug, Args)]
pub(crate) struct ApplyArgs {
    /// Name of a plan, or a file with what `rebalance plan --output json` printed, `-` for stdin; none:
    /// plan now.
    plan: Option<String>,
    /// Show progress until the plan is done; exit code 1 if it does not get there.
    #[arg(long)]
    wait: bool,
    /// Wait for so long at the most; the moves go on.
    #[arg(long, value_name = "TIME", default_value = "1h", requires = "wait", value_parser = humantime::parse_duration)]
    timeout: Duration,
    /// Do not ask.
    #[arg(long, short)]
    yes: bool,
}

/// What is to be carried out.
#[derive(Debug, PartialEq)]
enum Chosen {
    Named(String),
    Known(Box<RebalanceReply>),
}

pub(super) async fn run(global: &Global, args: ApplyArgs) -> Result<Exit> {
    possible(args.yes)?;
    let chosen = args.plan.as_deref().map(choose).transpose()?;
    let client = global.client().await?;
    let chosen = match chosen {
        Some(chosen) => chosen,
        None => Chosen::Known(Box::new(patiently(admin(&client).plan()).await?)),
    };
    let id = match chosen {
        Chosen::Named(id) => id,
        Chosen::Known(reply) => {
            if is_nothing(&reply) {
                render::show(global.output, &*reply, |reply| look::planned(reply, shown()))?;
                return Ok(Exit::Done);
            }
            let text = look::planned(&reply, shown());
            // The answer alone is data for a program.
            match global.output {
                Output::Table | Output::Wide => put(&text).map(drop)?,
                Output::Json => note(text),
            }
            reply.id
        }
    };
    if !confirmed(&format!("carry out plan {}?", plain(&id)), args.yes).await? {
        return Ok(Exit::Failed);
    }
    let begun = Instant::now();
    let reply = patiently(admin(&client).apply(&id)).await.map_err(again)?;
    match global.output {
        Output::Json => render::json(&reply).map(drop)?,
        Output::Table | Output::Wide if args.wait => note(started(&id, &reply)),
        Output::Table | Output::Wide => put(&started(&id, &reply)).map(drop)?,
    }
    if args.wait {
        return wait(global, &client, &id, begun, args.timeout).await;
    }
    if global.output.is_for_people() {
        note("follow it with: ruvector-cluster migrations watch");
    }
    Ok(Exit::Done)
}

/// A file, if there is one of that name.
fn choose(plan: &str) -> Result<Chosen> {
    if plan == "-" || Path::new(plan).is_file() {
        let (name, text) = input::read(Path::new(plan))?;
        return parse(&name, &text).map(|reply| Chosen::Known(Box::new(reply)));
    }
    let unknown = |e: Error| Error::Invalid(format!("there is no file {plan:?}, and as a name: {e}"));
    validate_name("plan", plan).map_err(unknown)?;
    Ok(Chosen::Named(plan.to_owned()))
}

fn parse(name: &str, text: &str) -> Result<RebalanceReply> {
    let needed = "it takes what `rebalance plan --output json` printed, of a running cluster";
    // A plan of a described cluster has its own form, and no name.
    let invalid =
        |e: serde_json::Error| Error::Invalid(format!("{name} holds no plan to apply: {e}; {needed}"));
    let reply: RebalanceReply = serde_json::from_str(text).map_err(invalid)?;
    if reply.id.is_empty() {
        return Err(Error::Invalid(format!("the plan in {name} has no id; {needed}")));
    }
    Ok(reply)
}

fn again(error: Error) -> Error {
    let hint = |text: String| format!("{text}\nplan again: ruvector-cluster rebalance plan");
    match error {
        Error::Conflict(text) => Error::Conflict(hint(text)),
        Error::NotFound(text) => Error::NotFound(hint(text)),
        other => other,
    }
}

fn started(id: &str, reply: &RebalanceReply) -> String {
    let moves = count(reply.moves as u64, "replica");
    let primaries = look::primaries(reply.promotions);
    format!("plan {} is under way: {moves} to move, {primaries} to hand over", plain(id))
}

/// How following a plan ends.
enum End {
    Done,
    /// So many moves are left, and nothing runs.
    Stalled(usize),
}

async fn wait(global: &Global, client: &Client, id: &str, begun: Instant, timeout: Duration) -> Result<Exit> {
    let mut interrupts = Interrupts::new()?;
    let goes_on = "the moves go on: see ruvector-cluster migrations ls, rebalance plan";
    let end = tokio::select! {
        end = follow(client) => end?,
        () = tokio::time::sleep_until(deadline(begun, timeout)) => {
            note(format!("error: plan {id} is not done after {}\n{goes_on}", span(timeout)));
            return Ok(Exit::Failed);
        }
        () = interrupts.next() => {
            note(goes_on);
            return Ok(Exit::Failed);
        }
    };
    match (end, global.output) {
        (End::Stalled(left), _) => {
            let left = count(left as u64, "move");
            note(format!("error: {left} are left, and nothing has moved for {}\n{goes_on}", span(STALLED)));
            return Ok(Exit::Failed);
        }
        (End::Done, Output::Table | Output::Wide) => {
            put(&format!("plan {} is done (took {})", plain(id), span(begun.elapsed())))?;
        }
        (End::Done, Output::Json) => {}
    }
    Ok(Exit::Done)
}

/// Shows migrations until none runs and the leader has none left to start.
async fn follow(client: &Client) -> Result<End> {
    let mut moved = Instant::now();
    let mut away: Option<Instant> = None;
    let mut fewest = usize::MAX;
    loop {
        if watch(client).await? {
            moved = Instant::now();
        }
        match left(client).await {
            Ok(0) => return Ok(End::Done),
            Ok(some) => {
                away = None;
                if some < fewest {
                    (fewest, moved) = (some, Instant::now());
                }
                if moved.elapsed() > STALLED {
                    return Ok(End::Stalled(some));
                }
            }
            Err(error) if error.is_retryable() => {
                if away.get_or_insert_with(Instant::now).elapsed() > AWAY {
                    return Err(error);
                }
            }
            Err(error) => return Err(error),
        }
        tokio::time::sleep(LOOK).await;
    }
}

/// Moves that run or that a plan made now would have.
async fn left(client: &Client) -> Result<usize> {
    let running = admin(client).status().await?.migrations;
    if running > 0 {
        return Ok(running);
    }
    Ok(admin(client).plan().await?.moves)
}

/// Shows migrations until none runs; whether one did.
async fn watch(client: &Client) -> Result<bool> {
    let mut follow = Follow::start(client, None).await?;
    let mut bars = MigrationBars::new();
    let mut over = BTreeSet::new();
    let mut seen = false;
    while let Some(change) = follow.next().await? {
        seen = true;
        let Change::Record(record) = change else { continue };
        bars.show(&record);
        if !record.phase.is_running() && over.insert(record.id.clone()) {
            bars.bars.aside(|| note(plain(&outcome(&record))));
        }
    }
    Ok(seen)
}

#[cfg(test)]
mod tests {
    use super::super::look::tests::reply;
    use super::*;

    #[test]
    fn a_plan_is_taken_from_the_json_that_was_printed() {
        let text = serde_json::to_string(&reply()).unwrap();
        assert_eq!(parse("plan.json", &text).unwrap(), reply());
        for (text, words) in [
            ("{\"moves\": 1,", "line 1 column 12"),
            ("{\"moves\": 0, \"promotions\": 0}", "no id"),
            (&serde_json::to_string(&reply().plan).unwrap(), "of a running cluster"),
        ] {
            let error = parse("plan.json", text).unwrap_err().to_string();
            assert!(error.contains(words) && error.contains("plan.json"), "{error}");
        }
    }

    #[test]
    fn what_is_no_file_is_a_name() {
        assert_eq!(choose("p-7f31c2").unwrap(), Chosen::Named("p-7f31c2".into()));
        let error = choose("nowhere/plan.json").unwrap_err().to_string();
        assert!(error.starts_with("there is no file \"nowhere/plan.json\""), "{error}");
    }

    #[test]
    fn a_plan_of_yesterday_is_answered_with_what_to_do() {
        let error = again(Error::Conflict("node n4 has joined since".into()));
        assert_eq!(
            error,
            Error::Conflict("node n4 has joined since\nplan again: ruvector-cluster rebalance plan".into())
        );
        assert!(matches!(again(Error::Busy("x".into())), Error::Busy(text) if text == "x"));
        assert_eq!(
            started("p-1", &reply()),
            "plan p-1 is under way: 3 replicas to move, 1 primary to hand over"
        );
    }
}
