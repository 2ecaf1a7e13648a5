//! `vectors search`.

use super::{Freshness, Numbers, compact, object};
use crate::cli::exit::Exit;
use crate::cli::global::Global;
use crate::cli::render::{self, Cell, Tone, note, table};
use crate::client::Client;
use crate::error::{Error, Result};
use crate::model::api::{SearchReply, to_seqs};
use crate::model::vector::MAX_K;
use crate::model::{Consistency, Payload, SearchQuery};
use clap::{ArgGroup, Args};

#[derive(Debug, Args)]
#[command(group(ArgGroup::new("near").required(true).args(["vector", "like"])))]
pub(crate) struct SearchArgs {
    /// Near to these numbers, a JSON array.
    #[arg(long, value_name = "NUMBERS")]
    vector: Option<Numbers>,
    /// Near to a stored vector, which itself is left out.
    #[arg(long, value_name = "ID")]
    like: Option<String>,
    /// How many.
    #[arg(short, long, default_value_t = 10, value_parser = clap::value_parser!(u32).range(1..=MAX_K as i64))]
    k: u32,
    /// Only vectors whose payload has these fields with these values, a JSON object.
    #[arg(long, value_name = "FIELDS", value_parser = object)]
    filter: Option<Payload>,
    /// Without payloads: where they are large, or many, more results fit into an answer.
    #[arg(long)]
    no_payload: bool,
    #[command(flatten)]
    fresh: Freshness,
    /// Answer even if some shards do not.
    #[arg(long)]
    allow_partial: bool,
}

pub(crate) async fn run(global: &Global, args: SearchArgs) -> Result<Exit> {
    let client = global.client().await?;
    let (k, consistency) = (args.k as usize, args.fresh.consistency);
    let (vector, without) = match (args.vector, args.like) {
        (Some(Numbers(vector)), _) => (vector, None),
        (None, like) => {
            let id = like.unwrap_or_default();
            (stored(&client, &id, consistency).await?, Some(id))
        }
    };
    // One more, since the vector itself is its nearest.
    let ask = if without.is_some() { (k + 1).min(MAX_K) } else { k };
    let query =
        SearchQuery { filter: args.filter, with_payload: !args.no_payload, ..SearchQuery::new(vector, ask) };
    let outcome = client.search_with(query, consistency, args.allow_partial).await?;
    let (ok, total) = (outcome.shards_ok, outcome.shards_total);
    if ok < total {
        note(format!("warning: only {ok} of {total} shards have answered"));
    }
    let mut hits = outcome.hits;
    hits.retain(|hit| Some(&hit.id) != without.as_ref());
    hits.truncate(k);
    let reply = SearchReply { hits, shards_ok: ok, shards_total: total, seqs: to_seqs(&outcome.seqs) };
    render::show(global.output, &reply, listing)?;
    Ok(Exit::Done)
}

async fn stored(client: &Client, id: &str, consistency: Consistency) -> Result<Vec<f32>> {
    let found = client.get_with(id, consistency).await?;
    let absent = || Error::NotFound(format!("no vector {id:?} to compare with"));
    Ok(found.entry.ok_or_else(absent)?.vector)
}

fn listing(reply: &SearchReply) -> String {
    let row = |hit: &crate::model::SearchResult| {
        vec![
            Cell::new(&hit.id).tone(Tone::Strong),
            Cell::right(format!("{:.6}", hit.score)),
            Cell::new(hit.payload.as_ref().map_or_else(|| "-".to_owned(), compact)),
        ]
    };
    table(&["ID", "SCORE", "PAYLOAD"], reply.hits.iter().map(row).collect())
}
