//! `/livez`, `/readyz` and `/metrics` on the node's address.

mod listener;

use crate::error::{Error, Result};
use crate::node::Node;
use axum::Router;
use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::IntoResponse;
use axum::routing::get;
use listener::Bounded;
use std::net::SocketAddr;
use std::sync::Arc;
use tokio::net::TcpListener;

/// Binds before the node joins, so that the address in its record is the real one.
pub(crate) async fn bind(addr: SocketAddr) -> Result<(TcpListener, SocketAddr)> {
    let failed = |e: std::io::Error| {
        Error::Invalid(format!(
            "cannot listen on {addr}: {e}; choose another address with --listen (port 0: any free one)"
        ))
    };
    let listener = TcpListener::bind(addr).await.map_err(failed)?;
    let bound = listener.local_addr().map_err(failed)?;
    Ok((listener, bound))
}

/// Serves until the node stops.
pub(crate) fn serve(listener: TcpListener, node: Arc<Node>) -> impl Future<Output = ()> + Send {
    let stop = node.ctx.stop.clone();
    let app = Router::new()
        .route("/livez", get(|| async { "ok\n" }))
        .route("/readyz", get(ready))
        .route("/metrics", get(metrics))
        .with_state(node);
    async move {
        if let Err(error) =
            axum::serve(Bounded::new(listener), app).with_graceful_shutdown(stop.cancelled_owned()).await
        {
            tracing::warn!("the HTTP server ended: {error}");
        }
    }
}

async fn ready(State(node): State<Arc<Node>>) -> impl IntoResponse {
    match node.ready() {
        Ok(()) => (StatusCode::OK, "ready\n".to_owned()),
        Err(error) => (StatusCode::SERVICE_UNAVAILABLE, format!("{error}\n")),
    }
}

async fn metrics(State(node): State<Arc<Node>>) -> impl IntoResponse {
    let metrics = &node.ctx.metrics;
    metrics.tasks.set(tokio::runtime::Handle::current().metrics().num_alive_tasks() as i64);
    ([(header::CONTENT_TYPE, "text/plain; version=0.0.4")], metrics.render())
}
