"""Small clones of the recommenders that people attach SAEs to, and what is true of each.

A clone has the module paths, the calling conventions and the head of its model, and is otherwise
as small as can be. Histories are lists of catalogue rows 0..N-1; each clone pads and numbers them
as its library does. Those that are trained somewhere take other sizes than the smallest.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import BertConfig, BertModel, GPT2Config, GPT2Model

from steerrec.sites import Lengths, Site, TokenIds

N, H, L = 12, 8, 6  # items, width, longest history
HEADS = 2
Lists = list[list[int]]


@dataclass(frozen=True)
class Clone:
    """A model, how its library scores with it, and what a user of hooks has to know.

    Attributes
    ----------
    build
        Makes the model, always the same.
    score
        The library's own scoring of some histories: [B, N] in the order of the catalogue.
    site
        Where the scored user vector is.
    head
        The scores [B, N] of user vectors [B, H], worked by hand.
    silent
        Paths of modules whose hooks never fire, and a word of the reason.
    real
        For some histories, which positions [B, L] of the model's batch are not padding.
    others
        More sites that can be read and written.
    written_later
        Sites whose tensor the model itself writes into after the hook.
    needs_slow_attention
        Whether torch's fast path for multi-head attention gives NaN.
    """

    name: str
    build: Callable[[], nn.Module]
    score: Callable[[Any, Lists], Tensor]
    site: Site
    head: Callable[[Any, Tensor], Tensor]
    silent: dict[str, str]
    real: Callable[[Lists], Tensor]
    others: tuple[Site, ...] = ()
    written_later: tuple[Site, ...] = ()
    needs_slow_attention: bool = False


class Parts(nn.Module):
    """A module with the given parts."""

    def __init__(self, **parts: nn.Module | nn.Parameter) -> None:
        super().__init__()
        for name, part in parts.items():
            setattr(self, name, part)

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any: ...


def linear(width: int = H, **settings: Any) -> nn.Linear:
    return nn.Linear(width, width, **settings)


def norm(width: int = H) -> nn.LayerNorm:
    return nn.LayerNorm(width)


conv, attention = partial(nn.Conv1d, H, H, 1), partial(nn.MultiheadAttention, H, HEADS, 0.1)


def mlp(width: int = H) -> nn.Module:
    return nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))


def twice(make: Callable[[], nn.Module]) -> nn.ModuleList:
    return nn.ModuleList([make(), make()])


def seeded(make: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    """A builder whose weights, padding included, are random, large and always the same."""

    def build() -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = make()
            for module in model.modules():
                for name, parameter in module.named_parameters(recurse=False):
                    scales = isinstance(module, nn.LayerNorm) and name == "weight"
                    nn.init.normal_(parameter, mean=float(scales), std=0.5)
        return model.eval()

    return build


def padded(histories: Lists, *, offset: int, pad: int, left: bool) -> Tensor:
    """The latest L items of each history as ids [B, L], from `offset` on."""
    ids = torch.full((len(histories), L), pad)
    for row, history in zip(ids, histories, strict=True):
        items = torch.tensor(history[-L:]) + offset
        row[slice(-len(items), None) if left else slice(len(items))] = items
    return ids


def real_right(histories: Lists) -> Tensor:
    """Which positions are real where padding is on the right."""
    return padded(histories, offset=0, pad=-1, left=False) >= 0


def real_left(histories: Lists) -> Tensor:
    """Which positions are real where padding is on the left."""
    return padded(histories, offset=0, pad=-1, left=True) >= 0


def masked(histories: Lists, mask: int = 0) -> Lists:
    """With a mask token at the end."""
    return [[*history, mask] for history in histories]


def attend(queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor) -> Tensor:
    """Attention of [B, L, H]; the mask fits [B, heads, L, L]."""
    q, k, v = (x.unflatten(-1, (HEADS, -1)).transpose(1, 2) for x in (queries, keys, values))
    return F.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2).flatten(2)


def causal() -> Tensor:
    """What a position must not attend to, [L, L]."""
    return ~torch.tril(torch.ones(L, L, dtype=torch.bool))


# --- RecBole: right-padded with 0, items from 1; full_sort_predict calls self.forward -----------


class RecBoleAttention(Parts):
    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        x_attended = attend(self.query(x), self.key(x), self.value(x), mask)
        return self.LayerNorm(self.dense(x_attended) + x)


class RecBoleFeedForward(Parts):
    def forward(self, x: Tensor) -> Tensor:
        return self.LayerNorm(self.dense_2(F.gelu(self.dense_1(x))) + x)


class RecBoleLayer(Parts):
    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return self.feed_forward(self.multi_head_attention(x, mask))


class RecBoleEncoder(Parts):
    def forward(self, x: Tensor, mask: Tensor) -> list[Tensor]:
        outputs = []
        for layer in self.layer:
            x = layer(x, mask)
            outputs.append(x)
        return outputs


def recbole_encoder() -> dict[str, nn.Module]:
    def layer() -> nn.Module:
        projections = {name: linear() for name in ("query", "key", "value", "dense")}
        return RecBoleLayer(
            multi_head_attention=RecBoleAttention(**projections, LayerNorm=norm()),
            feed_forward=RecBoleFeedForward(dense_1=linear(), dense_2=linear(), LayerNorm=norm()),
        )

    return {
        "position_embedding": nn.Embedding(L, H),
        "trm_encoder": RecBoleEncoder(layer=twice(layer)),
        "LayerNorm": norm(),
    }


class RecBoleModel(Parts):
    ITEM_SEQ, ITEM_SEQ_LEN = "item_id_list", "item_length"
    special_ids = 1  # the padding

    def __init__(
        self,
        *,
        items: int = N,
        width: int = H,
        window: int = L,
        **parts: nn.Module | nn.Parameter,
    ) -> None:
        table = nn.Embedding(items + self.special_ids, width, padding_idx=0)
        super().__init__(item_embedding=table, **parts)
        self.n_items, self.max_seq_length = items + 1, window

    def gather_indexes(self, output: Tensor, gather_index: Tensor) -> Tensor:
        index = gather_index.view(-1, 1, 1).expand(-1, -1, output.shape[-1])
        return output.gather(1, index).squeeze(1)

    def full_sort_predict(self, interaction: dict[str, Tensor]) -> Tensor:
        seq_output = self.forward(interaction[self.ITEM_SEQ], interaction[self.ITEM_SEQ_LEN])
        return seq_output @ self.item_embedding.weight.T


def recbole_encode(model: Parts, item_seq: Tensor, item_emb: Tensor, *, both: bool) -> Tensor:
    length = item_seq.shape[1]
    seen = (item_seq != 0)[:, None, None].expand(-1, -1, length, -1)
    mask = torch.where(seen if both else torch.tril(seen), 0.0, -10000.0)
    position_embedding = model.position_embedding(torch.arange(length).expand_as(item_seq))
    return model.trm_encoder(model.LayerNorm(item_emb + position_embedding), mask)[-1]


class RecBoleSASRec(RecBoleModel):
    def forward(self, item_seq: Tensor, item_seq_len: Tensor) -> Tensor:
        output = recbole_encode(self, item_seq, self.item_embedding(item_seq), both=False)
        return self.gather_indexes(output, item_seq_len - 1)


class RecBoleBERT4Rec(RecBoleModel):
    special_ids = 2  # the last one is the mask

    def reconstruct_test_data(self, item_seq: Tensor, item_seq_len: Tensor) -> Tensor:
        item_seq = F.pad(item_seq, (0, 1))
        for row, length in enumerate(item_seq_len):
            item_seq[row][length] = N + 1
        return item_seq[:, 1:]

    def forward(self, item_seq: Tensor) -> Tensor:
        output = recbole_encode(self, item_seq, self.item_embedding(item_seq), both=True)
        return self.output_ln(self.output_gelu(self.output_ffn(output)))

    def full_sort_predict(self, interaction: dict[str, Tensor]) -> Tensor:
        lengths = interaction["item_length"]
        seq_output = self.forward(self.reconstruct_test_data(interaction["item_id_list"], lengths))
        seq_output = self.gather_indexes(seq_output, lengths - 1)
        return seq_output @ self.item_embedding.weight[: N + 1].T + self.output_bias


class RecBoleGRU4Rec(RecBoleModel):
    def forward(self, item_seq: Tensor, item_seq_len: Tensor) -> Tensor:
        gru_output, _ = self.gru_layers(self.emb_dropout(self.item_embedding(item_seq)))
        return self.gather_indexes(self.dense(gru_output), item_seq_len - 1)


class RecBoleNARM(RecBoleModel):
    def forward(self, item_seq: Tensor, item_seq_len: Tensor) -> Tensor:
        gru_out, _ = self.gru(self.item_embedding(item_seq))
        last = self.gather_indexes(gru_out, item_seq_len - 1)
        real = item_seq.gt(0).unsqueeze(2)
        alpha = self.v_t(real * torch.sigmoid(self.a_1(gru_out) + self.a_2(last).unsqueeze(1)))
        return self.b(self.ct_dropout(torch.cat([(alpha * gru_out).sum(1), last], 1)))


class RecBoleTransNet(Parts):
    def forward(self, item_seq: Tensor, item_emb: Tensor) -> Tensor:
        alpha = self.fn(recbole_encode(self, item_seq, item_emb, both=False)).double()
        alpha = alpha.masked_fill((item_seq == 0).unsqueeze(-1), -9e15)
        return torch.softmax(alpha, dim=1, dtype=torch.float)


class RecBoleCORE(RecBoleModel):
    temperature = 0.07

    def forward(self, item_seq: Tensor) -> Tensor:
        x = self.sess_dropout(self.item_embedding(item_seq))
        return F.normalize((self.net(item_seq, x) * x).sum(1), dim=-1)

    def full_sort_predict(self, interaction: dict[str, Tensor]) -> Tensor:
        seq_output = self.forward(interaction["item_id_list"])
        return seq_output @ F.normalize(self.item_embedding.weight, dim=-1).T / self.temperature


@torch.no_grad()
def score_recbole(model: RecBoleModel, histories: Lists) -> Tensor:
    item_seq = padded(histories, offset=1, pad=0, left=False)
    interaction = {"item_id_list": item_seq, "item_length": (item_seq != 0).sum(1)}
    return model.full_sort_predict(interaction)[:, 1:]


def recbole_dot(model: RecBoleModel, users: Tensor) -> Tensor:
    return users @ model.item_embedding.weight[1 : N + 1].T


def recbole_gru4rec(items: int = N, width: int = H, window: int = L) -> nn.Module:
    return RecBoleGRU4Rec(
        items=items,
        width=width,
        window=window,
        emb_dropout=nn.Dropout(0.3),
        gru_layers=nn.GRU(width, width, 2, bias=False, batch_first=True),
        dense=linear(width),
    )


recbole = partial(Site, positions_from=TokenIds("item_embedding"))
RECBOLE = (
    Clone(
        name="RecBole SASRec",
        build=seeded(lambda: RecBoleSASRec(**recbole_encoder())),
        score=score_recbole,
        site=recbole("trm_encoder.layer.-1"),
        head=recbole_dot,
        silent={"": "forward", "trm_encoder.layer": "ModuleList"},
        real=real_right,
        others=(
            recbole("trm_encoder", select=(-1,)),
            recbole("trm_encoder", select=(0,)),
            recbole("trm_encoder.layer.0.multi_head_attention"),
            recbole("trm_encoder.layer.1", at="input", select=(0,)),
            Site("", method="gather_indexes", layout="BH"),
            Site("", method="forward", layout="BH"),
        ),
    ),
    Clone(
        name="RecBole BERT4Rec",
        build=seeded(
            lambda: RecBoleBERT4Rec(
                **recbole_encoder(),
                output_ffn=linear(),
                output_gelu=nn.GELU(),
                output_ln=norm(),
                output_bias=nn.Parameter(torch.zeros(N + 1)),
            )
        ),
        score=score_recbole,
        site=recbole("output_ln"),
        head=lambda model, users: recbole_dot(model, users) + model.output_bias[1:],
        silent={"": "forward"},
        real=real_right,  # a mask more at the end, but the oldest place is cut off
        others=(
            recbole("trm_encoder", select=(-1,)),
            recbole("output_gelu"),
            recbole("", method="forward"),
        ),
    ),
    Clone(
        name="RecBole GRU4Rec",
        build=seeded(recbole_gru4rec),
        score=score_recbole,
        site=recbole("dense"),
        head=recbole_dot,
        silent={"": "forward"},
        real=real_right,
        others=(recbole("gru_layers", select=(0,)),),
    ),
    Clone(
        name="RecBole NARM",
        build=seeded(
            lambda: RecBoleNARM(
                gru=nn.GRU(H, H, 1, bias=False, batch_first=True),
                a_1=linear(bias=False),
                a_2=linear(bias=False),
                v_t=nn.Linear(H, 1, bias=False),
                ct_dropout=nn.Dropout(0.5),
                b=nn.Linear(2 * H, H, bias=False),
            )
        ),
        score=score_recbole,
        site=Site("b", layout="BH"),
        head=recbole_dot,
        silent={"": "forward"},
        real=real_right,
        others=(recbole("gru", select=(0,)), recbole("a_1"), Site("a_2", layout="BH")),
    ),
    Clone(
        name="RecBole CORE",
        build=seeded(
            lambda: RecBoleCORE(
                sess_dropout=nn.Dropout(0.2),
                net=RecBoleTransNet(**recbole_encoder(), fn=nn.Linear(H, 1)),
            )
        ),
        score=score_recbole,
        site=Site("", method="forward", layout="BH"),
        head=lambda model, users: (
            users @ F.normalize(model.item_embedding.weight[1:], dim=-1).T / 0.07
        ),
        silent={"": "forward"},
        real=real_right,
        others=(recbole("net.trm_encoder", select=(-1,)), recbole("item_embedding")),
    ),
)


# --- RecTools: left-padded with 0, items from 1; encode_sessions writes into what layers emit ---


class RecToolsIds(Parts):
    def forward(self, items: Tensor) -> Tensor:
        return self.ids_emb(items)


class RecToolsItemNet(Parts):
    def forward(self, items: Tensor) -> Tensor:
        return torch.stack([block(items) for block in self.item_net_blocks]).sum(0)

    def get_all_embeddings(self) -> Tensor:
        return self.forward(torch.arange(N + 1))


class RecToolsPositions(Parts):
    def forward(self, sessions: Tensor) -> Tensor:
        sessions += self.pos_emb(torch.arange(L - 1, -1, -1).tile(len(sessions), 1))
        return sessions


class RecToolsBlock(Parts):
    def forward(self, seqs: Tensor, attn_mask: Tensor, key_padding_mask: None) -> Tensor:
        q = self.q_layer_norm(seqs)
        mha_output, _ = self.multi_head_attn(
            q, seqs, seqs, key_padding_mask, attn_mask=attn_mask, need_weights=False
        )
        ff_input = self.ff_layer_norm(q + mha_output)
        seqs = self.dropout(self.feed_forward(ff_input))
        seqs += ff_input
        return seqs


class RecToolsLayers(Parts):
    def forward(self, seqs: Tensor, timeline_mask: Tensor, attn_mask: Tensor) -> Tensor:
        for block in self.transformer_blocks:
            seqs *= timeline_mask
            seqs = block(seqs, attn_mask, None)
        seqs *= timeline_mask
        return self.last_layernorm(seqs)


class RecToolsSimilarity(Parts):
    def session_tower_forward(self, session_embs: Tensor) -> Tensor:
        return session_embs


class RecToolsBackbone(Parts):
    def encode_sessions(self, batch: dict[str, Tensor], item_embs: Tensor) -> Tensor:
        seqs = self.emb_dropout(self.pos_encoding_layer(item_embs[batch["x"]]))
        return self.transformer_layers(seqs, (batch["x"] != 0).unsqueeze(-1), causal())


def rectools_sasrec() -> nn.Module:
    def block() -> nn.Module:
        return RecToolsBlock(
            multi_head_attn=attention(batch_first=True),
            q_layer_norm=norm(),
            ff_layer_norm=norm(),
            feed_forward=mlp(),
            dropout=nn.Dropout(0.2),
        )

    ids = RecToolsIds(ids_emb=nn.Embedding(N + 1, H, padding_idx=0))
    return RecToolsBackbone(
        item_model=RecToolsItemNet(item_net_blocks=nn.ModuleList([ids])),
        pos_encoding_layer=RecToolsPositions(pos_emb=nn.Embedding(L, H)),
        emb_dropout=nn.Dropout(0.2),
        transformer_layers=RecToolsLayers(transformer_blocks=twice(block), last_layernorm=norm()),
        similarity_module=RecToolsSimilarity(),
    )


@torch.no_grad()
def score_rectools(model: RecToolsBackbone, histories: Lists) -> Tensor:
    item_embs = model.item_model.get_all_embeddings()
    batch = {"x": padded(histories, offset=1, pad=0, left=True)}
    users = model.encode_sessions(batch, item_embs)[:, -1, :]
    return model.similarity_module.session_tower_forward(users) @ item_embs[1:].T


class RecToolsFlatBlock(Parts):
    def forward(self, x: Tensor, attn_mask: Tensor, key_padding_mask: Tensor) -> Tensor:
        h = self.ln1(x)
        h, _ = self.mha(h, h, h, key_padding_mask, attn_mask=attn_mask, need_weights=False)
        x = x + h
        return x + self.ffn(self.ln2(x))


class RecToolsFlat(Parts):
    def encode_last(self, x: Tensor) -> Tensor:
        h = self.item_emb(x) + self.pos_emb(torch.arange(L))
        timeline_mask = (x != 0).unsqueeze(-1).float()  # NaN times zero is NaN
        for block in self.blocks:
            h = block(h * timeline_mask, causal(), x == 0)
        return self.final_ln(h * timeline_mask)[:, -1, :]

    def all_item_embeddings(self) -> Tensor:
        return self.item_emb(torch.arange(1, N + 1))


def rectools_flat() -> nn.Module:
    def block() -> nn.Module:
        mha = attention(batch_first=True)
        return RecToolsFlatBlock(ln1=norm(), mha=mha, ln2=norm(), ffn=mlp())

    return RecToolsFlat(
        item_emb=nn.Embedding(N + 1, H, padding_idx=0),
        pos_emb=nn.Embedding(L, H),
        blocks=twice(block),
        final_ln=norm(),
    )


@torch.no_grad()
def score_rectools_flat(model: RecToolsFlat, histories: Lists) -> Tensor:
    users = model.encode_last(padded(histories, offset=1, pad=0, left=True))
    return users @ model.all_item_embeddings().T


rectools = partial(Site, positions_from="last")  # no module is given the ids of the histories
rectools_all = partial(Site, positions="all")
RECTOOLS = (
    Clone(
        name="RecTools SASRec",
        build=seeded(rectools_sasrec),
        score=score_rectools,
        site=rectools("transformer_layers.last_layernorm"),
        head=lambda model, users: users @ model.item_model.item_net_blocks[0].ids_emb.weight[1:].T,
        silent={
            "": "forward",
            "item_model": "forward",
            "similarity_module": "forward",
            "transformer_layers.transformer_blocks": "ModuleList",
            "transformer_layers.transformer_blocks.0.multi_head_attn.out_proj": "out_proj",
        },
        real=real_left,
        others=(
            rectools("transformer_layers"),
            rectools("emb_dropout"),
            rectools("transformer_layers.transformer_blocks.0"),
            rectools("transformer_layers.transformer_blocks.-1"),
            rectools("transformer_layers.transformer_blocks.0.multi_head_attn", select=(0,)),
            rectools("", method="encode_sessions"),
        ),
        written_later=(
            rectools_all("emb_dropout"),
            rectools_all("transformer_layers.transformer_blocks.0"),
            rectools_all("transformer_layers.transformer_blocks.-1"),
        ),
    ),
    Clone(
        name="RecTools Flat SASRec",
        build=seeded(rectools_flat),
        score=score_rectools_flat,
        site=Site("final_ln", positions_from=TokenIds("item_emb")),
        head=lambda model, users: users @ model.item_emb.weight[1:].T,
        silent={"": "forward", "blocks": "ModuleList", "blocks.0.mha.out_proj": "out_proj"},
        real=real_left,
        others=(
            rectools("blocks.0"),
            Site("blocks.0.mha", select=(0,), positions_from=TokenIds("item_emb")),
            Site("", method="encode_last", layout="BH"),
        ),
        needs_slow_attention=True,
    ),
)


# --- RePlay: left-padded, items from 0; predict() in old models, a root that returns a dict in new


class PointWise(Parts):
    def forward(self, inputs: Tensor) -> Tensor:
        hidden = F.relu(self.conv1(inputs.transpose(-1, -2)))
        return self.dropout2(self.conv2(hidden)).transpose(-1, -2)


class RePlayPointWise(PointWise):
    def forward(self, inputs: Tensor) -> Tensor:
        outputs = super().forward(inputs)
        outputs += inputs
        return outputs


class RePlayLayers(Parts):
    def block(self, i: int, seqs: Tensor, mask: Tensor) -> Tensor:
        query = self.attention_layernorms[i](seqs)
        emb, _ = self.attention_layers[i](query, seqs, seqs, attn_mask=mask, need_weights=False)
        return self.forward_layers[i](self.forward_layernorms[i](query + emb))

    def forward(self, seqs: Tensor, attention_mask: Tensor, padding_mask: Tensor) -> Tensor:
        for i in range(2):
            seqs = self.block(i, seqs, attention_mask)
            seqs *= padding_mask
        return seqs


class RePlayEncoder(RePlayLayers):
    def forward(  # type: ignore[override]
        self, *, input_embeddings: Tensor, padding_mask: Tensor, attention_mask: Tensor
    ) -> Tensor:
        return self.block(1, self.block(0, input_embeddings, attention_mask), attention_mask)


def replay_layers(kind: type[RePlayLayers]) -> nn.Module:
    def feed_forward() -> nn.Module:
        return RePlayPointWise(conv1=conv(), conv2=conv(), dropout2=nn.Dropout(0.2))

    return kind(
        attention_layers=twice(lambda: attention(batch_first=True)),
        attention_layernorms=twice(norm),
        forward_layers=twice(feed_forward),
        forward_layernorms=twice(norm),
    )


class Positions(Parts):
    def forward(self, x: Tensor) -> Tensor:
        return self.pe.weight.expand(len(x), -1, -1)


class RePlayEmbeddings(Parts):
    def forward(self, feature_tensor: dict[str, Tensor], padding_mask: Tensor) -> Tensor:
        seqs = self.item_emb(feature_tensor["item_id"]) * H**0.5
        seqs += self.pos_emb(seqs)
        seqs = self.item_emb_dropout(seqs)
        seqs *= padding_mask
        return seqs


class RePlayNormalizer(Parts):
    def forward(self, seqs: Tensor) -> Tensor:
        return self.last_layernorm(seqs)


class RePlayTyingHead(Parts):
    def forward(self, out_embeddings: Tensor) -> Tensor:
        return out_embeddings @ self._item_embedder.item_emb.weight[:-1].T


class RePlayLegacy(Parts):
    def get_query_embeddings(self, *batch: Any) -> Tensor:
        return self.forward_step(*batch)[:, -1, :]

    def predict(self, *batch: Any) -> Tensor:
        return self._head(self.get_query_embeddings(*batch))


class RePlaySasRecModel(RePlayLegacy):
    def forward_step(self, feature_tensor: dict[str, Tensor], padding_mask: Tensor) -> Tensor:
        item_id = feature_tensor["item_id"].masked_fill(~padding_mask, N)
        padding_mask = padding_mask.unsqueeze(-1)
        seqs = self.item_embedder({"item_id": item_id}, padding_mask)
        return self.output_normalization(self.sasrec_layers(seqs, causal(), padding_mask))


def replay_sasrec_legacy() -> nn.Module:
    item_embedder = RePlayEmbeddings(
        item_emb=nn.Embedding(N + 1, H, padding_idx=N),
        pos_emb=Positions(pe=nn.Embedding(L, H)),
        item_emb_dropout=nn.Dropout(0.2),
    )
    return RePlaySasRecModel(
        item_embedder=item_embedder,
        sasrec_layers=replay_layers(RePlayLayers),
        output_normalization=RePlayNormalizer(last_layernorm=norm()),
        _head=RePlayTyingHead(_item_embedder=item_embedder),
    )


@torch.no_grad()
def score_replay_sasrec_legacy(model: RePlaySasRecModel, histories: Lists) -> Tensor:
    item_id = padded(histories, offset=0, pad=0, left=True)  # the mask alone says what is padding
    return model.predict({"item_id": item_id}, real_left(histories))


class RePlayBertEmbedding(Parts):
    def forward(self, inputs: dict[str, Tensor], token_mask: Tensor) -> Tensor:
        x = self.cat_embeddings["item_id"](inputs["item_id"])
        x = x.where(token_mask.unsqueeze(-1), self.mask_embedding.weight)
        x += self.position(x)
        return self.dropout(x)


class RePlayBertBlock(Parts):
    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        x_norm = self.attention_norm(x)
        emb, _ = self.attention(x_norm, x_norm, x_norm, key_padding_mask=~mask, need_weights=False)
        y = x + emb
        return self.dropout(y + self.pff(self.pff_norm(y)))


class RePlayClassificationHead(Parts):
    def forward(self, out_embeddings: Tensor) -> Tensor:
        return F.linear(out_embeddings, self.linear.weight, self.linear.bias)


class RePlayBert4RecModel(RePlayLegacy):
    num_passes_over_block = 2

    def forward_step(self, inputs: dict[str, Tensor], pad: Tensor, token_mask: Tensor) -> Tensor:
        x = self.item_embedder(inputs, token_mask)
        for transformer in self.transformer_blocks:
            for _ in range(self.num_passes_over_block):
                x = transformer(x, pad)
        return x


def replay_bert_legacy() -> nn.Module:
    def block() -> nn.Module:
        return RePlayBertBlock(
            attention=attention(batch_first=True),
            attention_norm=norm(),
            pff=mlp(),
            pff_norm=norm(),
            dropout=nn.Dropout(0.1),
        )

    return RePlayBert4RecModel(
        item_embedder=RePlayBertEmbedding(
            cat_embeddings=nn.ModuleDict({"item_id": nn.Embedding(N, H)}),
            mask_embedding=nn.Embedding(1, H),
            position=Positions(pe=nn.Embedding(L, H)),
            dropout=nn.Dropout(0.1),
        ),
        transformer_blocks=twice(block),
        _head=RePlayClassificationHead(linear=nn.Linear(H, N)),
    )


@torch.no_grad()
def score_replay_bert_legacy(model: RePlayBert4RecModel, histories: Lists) -> Tensor:
    item_id = padded(masked(histories), offset=0, pad=0, left=True)
    pad_mask = real_left(masked(histories))
    token_mask = pad_mask & (torch.arange(L) < L - 1)
    return model.predict({"item_id": item_id}, pad_mask, token_mask)


class RePlayCategorical(Parts):
    def forward(self, indices: Tensor) -> Tensor:
        return self.emb(indices)


class RePlayEmbedder(Parts):
    def forward(self, feature_tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: self.feature_embedders[name](ids) for name, ids in feature_tensors.items()}

    def get_item_weights(self) -> Tensor:
        return self.feature_embedders["item_id"].emb.weight[:-1]


class RePlayAggregator(Parts):
    def forward(self, feature_tensors: dict[str, Tensor]) -> Tensor:
        seqs = torch.stack(list(feature_tensors.values())).sum(0)
        seqs *= H**0.5
        seqs += self.pe.weight[-seqs.shape[1] :]
        return seqs


class RePlayBody(Parts):
    def forward(self, feature_tensors: dict[str, Tensor], padding_mask: Tensor) -> Tensor:
        seqs = self.embedding_aggregator(self.embedder(feature_tensors))
        hidden = (causal() | ~padding_mask.unsqueeze(1)) & ~torch.eye(L, dtype=torch.bool)
        hidden = hidden.repeat_interleave(HEADS, dim=0)
        seqs = self.encoder(
            input_embeddings=seqs,
            padding_mask=padding_mask,
            attention_mask=torch.zeros(hidden.shape).masked_fill(hidden, -torch.inf),
        )
        return self.output_normalization(seqs)


class RePlayHead(Parts):
    def forward(self, hidden_states: Tensor, item_embeddings: Tensor) -> Tensor:
        return hidden_states @ item_embeddings.T


class RePlaySasRec(Parts):
    def forward(self, feature_tensors: dict[str, Tensor], padding_mask: Tensor) -> dict[str, Any]:
        hidden_states = self.body(feature_tensors, padding_mask)
        users = hidden_states[:, -1, :].contiguous()
        logits = self.head(users, self.body.embedder.get_item_weights())
        return {"logits": logits, "hidden_states": (hidden_states,)}


def replay_sasrec() -> nn.Module:
    item_id = RePlayCategorical(emb=nn.Embedding(N + 1, H, padding_idx=N))
    body = RePlayBody(
        embedder=RePlayEmbedder(feature_embedders=nn.ModuleDict({"item_id": item_id})),
        embedding_aggregator=RePlayAggregator(pe=nn.Embedding(L, H)),
        encoder=replay_layers(RePlayEncoder),
        output_normalization=norm(),
    )
    return RePlaySasRec(body=body, head=RePlayHead())


@torch.no_grad()
def score_replay_sasrec(model: RePlaySasRec, histories: Lists) -> Tensor:
    item_id = padded(histories, offset=0, pad=N, left=True)
    return model(feature_tensors={"item_id": item_id}, padding_mask=item_id != N)["logits"]


legacy = partial(Site, positions_from=TokenIds("item_embedder.item_emb", pad_id=N))
# padding is item 0 with a mask beside it: by their ids, all positions are real
bert = partial(Site, positions_from=TokenIds("item_embedder.cat_embeddings.item_id", pad_id=-1))
replay = partial(
    Site, positions_from=TokenIds("body.embedder.feature_embedders.item_id.emb", pad_id=N)
)
REPLAY = (
    Clone(
        name="RePlay SasRec, legacy",
        build=seeded(replay_sasrec_legacy),
        score=score_replay_sasrec_legacy,
        site=legacy("output_normalization"),
        head=lambda model, users: users @ model.item_embedder.item_emb.weight[:N].T,
        silent={
            "": "forward",
            "sasrec_layers.forward_layers": "ModuleList",
            "sasrec_layers.attention_layers.1.out_proj": "out_proj",
        },
        real=real_left,
        others=(
            Site("output_normalization.last_layernorm", positions_from="last"),
            legacy("sasrec_layers"),
            legacy("sasrec_layers.forward_layers.-1"),
            legacy("sasrec_layers.attention_layers.0", select=(0,)),
            legacy("sasrec_layers.forward_layers.0.conv2", layout="BHL"),
            Site("_head", at="input", select=(0,), layout="BH"),
            Site("", method="get_query_embeddings", layout="BH"),
        ),
        written_later=(
            Site("sasrec_layers.forward_layers.0", positions="all"),
            Site("sasrec_layers.forward_layers.0.conv2", layout="BHL", positions="all"),
            Site("item_embedder.item_emb_dropout", positions="all"),
        ),
    ),
    Clone(
        name="RePlay Bert4Rec, legacy",
        build=seeded(replay_bert_legacy),
        score=score_replay_bert_legacy,
        site=bert("transformer_blocks.-1", call=1),
        head=lambda model, users: users @ model._head.linear.weight.T + model._head.linear.bias,
        silent={
            "": "forward",
            "_head.linear": "weights",
            "transformer_blocks": "ModuleList",
            "transformer_blocks.0.attention.out_proj": "out_proj",
        },
        real=lambda histories: real_left(masked(histories)),
        others=(
            bert("transformer_blocks.0", call="first"),
            bert("transformer_blocks.0", call="all"),
            Site("_head", at="input", select=(0,), layout="BH"),
        ),
    ),
    Clone(
        name="RePlay SasRec",
        build=seeded(replay_sasrec),
        score=score_replay_sasrec,
        site=replay("body.output_normalization"),
        head=lambda model, users: (
            users @ model.body.embedder.feature_embedders.item_id.emb.weight[:N].T
        ),
        silent={
            "body.embedder.feature_embedders": "ModuleDict",
            "body.encoder.attention_layers": "ModuleList",
            "body.encoder.attention_layers.0.out_proj": "out_proj",
        },
        real=real_left,
        others=(
            Site("", select=("hidden_states", 0), positions_from="last"),
            Site("", select=("logits",), layout="BH"),
            replay("body"),
            replay("body.embedder", select=("item_id",)),
            replay("body.encoder", at="input", select=("input_embeddings",)),
            Site("head", at="input", select=(0,), layout="BH"),
        ),
    ),
)


# --- gSASRec: left-padded with N + 1, items from 1; forward returns a tuple ---------------------


class GSASRecAttention(Parts):
    def forward(self, queries: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
        projected = self.query_proj(queries), self.key_proj(keys), self.val_proj(keys)
        q, k, v = (torch.cat(x.chunk(HEADS, dim=2)) for x in projected)
        empty = (keys.abs().sum(-1) == 0).repeat(HEADS, 1).unsqueeze(1)  # a zero row is padding
        scores = (q @ k.mT / k.shape[-1] ** 0.5).masked_fill(empty | causal(), -torch.inf)
        weights = torch.nan_to_num(F.softmax(scores, dim=-1))
        return torch.cat((weights @ v).chunk(HEADS), dim=2), weights


class GSASRecBlock(Parts):
    def forward(self, seq: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        queries = self.first_norm(seq)
        x, attentions = self.multihead_attention(queries, seq)
        x = self.second_norm(x + queries)
        x = self.dense2(F.relu(self.dense1(x))) + x
        x *= mask
        return x, attentions


class GSASRec(Parts):
    def forward(self, input: Tensor) -> tuple[Tensor, list[Tensor]]:
        seq = self.item_embedding(input) + self.position_embedding(torch.arange(L))
        seq = self.embeddings_dropout(seq)
        mask = (input != N + 1).float().unsqueeze(-1)
        seq *= mask
        attentions = []
        for block in self.transformer_blocks:
            seq, weights = block(seq, mask)
            attentions.append(weights)
        return self.seq_norm(seq), attentions

    def get_predictions(self, input: Tensor, limit: int) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            model_out, _ = self.forward(input)
            scores = model_out[:, -1, :] @ self.output_embedding.weight.T
            scores[:, 0] = scores[:, N + 1 :] = -torch.inf
            values, indices = scores.topk(limit, dim=1)
            return indices, values


def gsasrec_model() -> nn.Module:
    def block() -> nn.Module:
        projections = {name: linear() for name in ("query_proj", "key_proj", "val_proj")}
        return GSASRecBlock(
            first_norm=norm(),
            multihead_attention=GSASRecAttention(**projections),
            second_norm=norm(),
            dense1=linear(),
            dense2=linear(),
        )

    return GSASRec(
        item_embedding=nn.Embedding(N + 2, H),
        output_embedding=nn.Embedding(N + 2, H),
        position_embedding=nn.Embedding(L, H),
        embeddings_dropout=nn.Dropout(0.5),
        transformer_blocks=twice(block),
        seq_norm=norm(),
    )


def score_gsasrec(model: GSASRec, histories: Lists) -> Tensor:
    ids = padded(histories, offset=1, pad=N + 1, left=True)
    indices, values = model.get_predictions(ids, limit=N)
    return torch.empty(len(histories), N).scatter_(1, indices - 1, values)


gsasrec = partial(Site, positions_from=TokenIds("item_embedding", pad_id=N + 1))
GSASREC = Clone(
    name="gSASRec",
    build=seeded(gsasrec_model),
    score=score_gsasrec,
    site=gsasrec("seq_norm"),
    head=lambda model, users: users @ model.output_embedding.weight[1 : N + 1].T,
    silent={"": "forward", "output_embedding": "weights", "transformer_blocks": "ModuleList"},
    real=real_left,
    others=(
        gsasrec("transformer_blocks.-1", select=(0,)),
        gsasrec("transformer_blocks.0.multihead_attention", select=(0,)),
        gsasrec("", method="forward", select=(0,)),
    ),
    written_later=(Site("embeddings_dropout", positions="all"),),
)


# --- SASRec.pytorch: numpy ids, left-padded with 0, items from 1; predict calls log2feats -------


class PMixerSASRec(Parts):
    def log2feats(self, log_seqs: np.ndarray) -> Tensor:
        ids = torch.from_numpy(log_seqs)
        seqs = self.item_emb(ids)
        seqs *= H**0.5
        seqs += self.pos_emb(torch.arange(1, L + 1) * (ids != 0))
        for i in range(2):
            seqs = seqs.transpose(0, 1)
            mha_outputs, _ = self.attention_layers[i](seqs, seqs, seqs, attn_mask=causal())
            seqs = self.attention_layernorms[i](seqs + mha_outputs).transpose(0, 1)
            seqs = self.forward_layernorms[i](seqs + self.forward_layers[i](seqs))
        return self.last_layernorm(seqs)

    def predict(self, users: np.ndarray, log_seqs: np.ndarray, items: np.ndarray) -> Tensor:
        final_feat = self.log2feats(log_seqs)[:, -1, :]
        item_embs = self.item_emb(torch.from_numpy(items))
        return item_embs.matmul(final_feat.unsqueeze(-1)).squeeze(-1)


def pmixer_model() -> nn.Module:
    return PMixerSASRec(
        item_emb=nn.Embedding(N + 1, H, padding_idx=0),
        pos_emb=nn.Embedding(L + 1, H, padding_idx=0),
        attention_layernorms=twice(norm),
        attention_layers=twice(attention),
        forward_layernorms=twice(norm),
        forward_layers=twice(
            lambda: PointWise(conv1=conv(), conv2=conv(), dropout2=nn.Dropout(0.2))
        ),
        last_layernorm=norm(),
    )


@torch.no_grad()
def score_pmixer(model: PMixerSASRec, histories: Lists) -> Tensor:
    log_seqs = padded(histories, offset=1, pad=0, left=True).numpy()
    return model.predict(np.arange(len(histories)), log_seqs, np.arange(1, N + 1))


pmixer = partial(Site, positions_from=TokenIds("item_emb"))
PMIXER = Clone(
    name="SASRec.pytorch",
    build=seeded(pmixer_model),
    score=score_pmixer,
    site=pmixer("last_layernorm"),
    head=lambda model, users: users @ model.item_emb.weight[1:].T,
    silent={
        "": "forward",
        "attention_layers": "ModuleList",
        "attention_layers.0.out_proj": "out_proj",
    },
    real=real_left,
    others=(
        Site("last_layernorm", positions_from="last"),
        pmixer("item_emb", call="first"),
        pmixer("attention_layers.0", select=(0,), layout="LBH"),
        pmixer("attention_layernorms.1", at="input", layout="LBH"),
        pmixer("forward_layers.0.conv1", layout="BHL"),
        pmixer("forward_layers.-1"),
        pmixer("", method="log2feats"),
    ),
    written_later=(pmixer("item_emb", call="first", positions="all"),),
)


# --- BERT4Rec-VAE: left-padded with 0, items from 1; calls the forward of its blocks directly ---


class BertVaeEmbedding(Parts):
    def forward(self, sequence: Tensor) -> Tensor:
        return self.token(sequence) + self.position(sequence)


class BertVaeAttention(Parts):
    def forward(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
        q, k, v = (self.linear_layers[i](x) for i, x in enumerate((query, key, value)))
        return self.output_linear(attend(q, k, v, mask))


class BertVaeSublayer(Parts):
    def forward(self, x: Tensor, sublayer: Callable[[Tensor], Tensor]) -> Tensor:
        return x + sublayer(self.norm(x))


class BertVaeBlock(Parts):
    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        x = self.input_sublayer(x, lambda y: self.attention.forward(y, y, y, mask=mask))
        return self.dropout(self.output_sublayer(x, self.feed_forward))


class BertVae(Parts):
    def forward(self, x: Tensor) -> Tensor:
        mask = (x > 0)[:, None, None]
        x = self.embedding(x)
        for transformer in self.transformer_blocks:
            x = transformer.forward(x, mask)
        return x


class BertVaeModel(Parts):
    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.bert(x))


def bert_vae_model(items: int = N, width: int = H, window: int = L, layers: int = 2) -> nn.Module:
    def block() -> nn.Module:
        linear_layers = nn.ModuleList(linear(width) for _ in range(3))
        return BertVaeBlock(
            attention=BertVaeAttention(linear_layers=linear_layers, output_linear=linear(width)),
            feed_forward=mlp(width),
            input_sublayer=BertVaeSublayer(norm=norm(width)),
            output_sublayer=BertVaeSublayer(norm=norm(width)),
            dropout=nn.Dropout(0.1),
        )

    embedding = BertVaeEmbedding(
        token=nn.Embedding(items + 2, width, padding_idx=0),
        position=Positions(pe=nn.Embedding(window, width)),
    )
    return BertVaeModel(
        bert=BertVae(
            embedding=embedding, transformer_blocks=nn.ModuleList(block() for _ in range(layers))
        ),
        out=nn.Linear(width, items + 1),
    )


@torch.no_grad()
def score_bert_vae(model: BertVaeModel, histories: Lists) -> Tensor:
    seqs = padded(masked(histories, N), offset=1, pad=0, left=True)
    return model(seqs)[:, -1, 1:]


bert_vae = partial(Site, positions_from=TokenIds("bert.embedding.token"))
BERT_VAE = Clone(
    name="BERT4Rec-VAE",
    build=seeded(bert_vae_model),
    score=score_bert_vae,
    site=Site("bert", positions_from=TokenIds("")),
    head=lambda model, users: users @ model.out.weight[1:].T + model.out.bias[1:],
    silent={
        "bert.transformer_blocks": "ModuleList",
        "bert.transformer_blocks.1": "forward",
        "bert.transformer_blocks.0.attention": "forward",
    },
    real=lambda histories: real_left(masked(histories)),
    others=(
        bert_vae("bert.transformer_blocks.-1", method="forward"),
        Site("bert.transformer_blocks.0.dropout", positions_from=TokenIds("bert")),
        bert_vae("bert.transformer_blocks.0.input_sublayer"),
        bert_vae("bert.transformer_blocks.0.attention", method="forward"),
        bert_vae("out", at="input"),
    ),
)


# --- GRU4Rec, the official one: items from 0, no padding; forward runs one step -----------------


class GRU4Rec(Parts):
    def embed(self, X: Tensor, H: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        return self.Wy(X), self.Wy.weight, self.By.weight

    def hidden_step(self, X: Tensor, H: list[Tensor]) -> Tensor:
        for i, cell in enumerate(self.G):
            X = H[i] = cell(X, H[i])
        return X

    def score_items(self, X: Tensor, O: Tensor, B: Tensor) -> Tensor:  # noqa: E741
        return torch.mm(X, O.T) + B.T

    def forward(self, X: Tensor, H: list[Tensor], Y: None, training: bool = False) -> Tensor:
        E, O, B = self.embed(X, H)  # noqa: E741
        return self.score_items(self.hidden_step(E, H), O, B)


def gru4rec_model(items: int = N, width: int = H) -> nn.Module:
    cells = nn.ModuleList([nn.GRUCell(width, width)])
    return GRU4Rec(G=cells, Wy=nn.Embedding(items, width), By=nn.Embedding(items, 1))


@torch.no_grad()
def score_gru4rec(model: GRU4Rec, histories: Lists) -> Tensor:
    """Sessions side by side, so that all end with the last step; H is reset where one begins."""
    longest = max(map(len, histories))
    starts = torch.tensor([longest - len(history) for history in histories])
    steps = torch.tensor([[0] * (longest - len(history)) + history for history in histories])
    states = [torch.zeros(len(histories), H)]
    scores = torch.empty(0)
    for step, items in enumerate(steps.T):
        states[0][starts == step] = 0
        scores = model.forward(items, states, None, training=False)
    return scores


GRU4REC = Clone(
    name="GRU4Rec",
    build=seeded(gru4rec_model),
    score=score_gru4rec,
    site=Site("", method="score_items", at="input", select=(0,), layout="BH"),
    head=lambda model, users: users @ model.Wy.weight.T + model.By.weight.T,
    silent={"": "forward", "G": "ModuleList", "By": "weights"},
    real=real_left,
    others=(
        Site("", method="score_items", layout="BH"),
        Site("", method="forward", layout="BH"),
        Site("G.-1", layout="BH"),
    ),
    written_later=(Site("G.-1", layout="BH"),),
)


# --- Hugging Face backbones, as cornac (GPT-2) and others (BERT) make recommenders of them ------


class GPT2Recommender(Parts):
    def encode(self, hist_iids: Tensor) -> Tensor:
        real = (hist_iids != N).long()
        output = self.backbone(inputs_embeds=self.item_emb(hist_iids), attention_mask=real)
        return output.last_hidden_state

    @torch.no_grad()
    def predict(self, user: None, log_seqs: Tensor) -> np.ndarray:
        hidden = self.encode(log_seqs)[:, -1, :]
        items = torch.arange(N)
        return (hidden @ self.item_emb(items).T + self.item_biases(items).T).squeeze().numpy()


def gpt2_model() -> nn.Module:
    size = {"n_positions": L, "n_embd": H, "n_layer": 2, "n_head": HEADS}
    config = GPT2Config(vocab_size=N + 2, bos_token_id=None, eos_token_id=None, **size)
    return GPT2Recommender(
        item_emb=nn.Embedding(N + 2, H, padding_idx=N),
        backbone=GPT2Model(config),
        item_biases=nn.Embedding(N + 2, 1, padding_idx=N),
    )


def score_gpt2(model: GPT2Recommender, histories: Lists) -> Tensor:
    rows = padded(histories, offset=0, pad=N, left=True)  # one user a call
    return torch.stack([torch.from_numpy(model.predict(None, row[None])) for row in rows])


class BertRecommender(Parts):
    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        outputs = self.transformer_model(
            inputs_embeds=self.embed_layer(input_ids),
            attention_mask=attention_mask,
            output_hidden_states=True,
        )
        return self.head(outputs.last_hidden_state)


def bert_model() -> nn.Module:
    config = BertConfig(
        vocab_size=N + 2,
        hidden_size=H,
        num_hidden_layers=2,
        num_attention_heads=HEADS,
        intermediate_size=2 * H,
        max_position_embeddings=L,
    )
    return BertRecommender(
        embed_layer=nn.Embedding(N + 2, H, padding_idx=0),
        transformer_model=BertModel(config),
        head=nn.Linear(H, N + 2, bias=False),
    )


@torch.no_grad()
def score_bert(model: BertRecommender, histories: Lists) -> Tensor:
    input_ids = padded(masked(histories, N), offset=1, pad=0, left=False)
    real = input_ids != 0
    logits = model(input_ids=input_ids, attention_mask=real)
    return logits[torch.arange(len(histories)), real.sum(1) - 1, 1 : N + 1]


gpt2 = partial(Site, positions_from=TokenIds("item_emb", pad_id=N))
hf_bert = partial(Site, positions_from=TokenIds(""))
HUGGING_FACE = (
    Clone(
        name="GPT-2 backbone",
        build=seeded(gpt2_model),
        score=score_gpt2,
        site=Site("backbone.ln_f", positions_from="last"),
        head=lambda model, users: (
            users @ model.item_emb.weight[:N].T + model.item_biases.weight[:N].T
        ),
        silent={"": "forward", "backbone.h": "ModuleList", "backbone.wte": "weights"},
        real=real_left,
        others=(
            gpt2("backbone", select=("last_hidden_state",)),
            gpt2("backbone", select=(0,)),
            gpt2("backbone", at="input", select=("inputs_embeds",)),
            gpt2("backbone.h.-1"),
            gpt2("backbone.h.0.attn", select=(0,)),
            gpt2("", method="encode"),
        ),
    ),
    Clone(
        name="BERT backbone",
        build=seeded(bert_model),
        score=score_bert,
        site=hf_bert("transformer_model.encoder.layer.-1"),
        head=lambda model, users: users @ model.head.weight[1 : N + 1].T,
        silent={"transformer_model.encoder.layer": "ModuleList"},
        real=lambda histories: real_right(masked(histories)),
        others=(
            hf_bert("transformer_model", select=("last_hidden_state",)),
            hf_bert("transformer_model", select=("hidden_states", -1)),
            hf_bert("transformer_model.encoder", select=(0,)),
            hf_bert("transformer_model.encoder.layer.0.attention", select=(0,)),
            Site("head", at="input", positions_from=TokenIds("embed_layer")),
        ),
    ),
)


# --- HSTU: right-padded with 0 and jagged inside, items from 1; L2-normalised users and items ---


def to_dense(values: Tensor, offsets: Tensor) -> Tensor:
    """[sum of lengths, H] as [B, L, H], padded with zeros."""
    out = values.new_zeros(len(offsets) - 1, L, values.shape[-1])
    out[torch.arange(L) < offsets.diff()[:, None]] = values
    return out


def to_jagged(x: Tensor, offsets: Tensor) -> Tensor:
    return x[torch.arange(L) < offsets.diff()[:, None]]


class HSTULayer(Parts):
    def forward(
        self, x: Tensor, x_offsets: Tensor, invalid_attn_mask: Tensor
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        u, v, q, k = F.silu(F.layer_norm(x, [H]) @ self._uvqk).chunk(4, dim=1)
        q, k, v = (to_dense(values, x_offsets) for values in (q, k, v))
        attended = F.silu(q @ k.mT) / L * invalid_attn_mask @ v
        out = self._o(u * F.layer_norm(to_jagged(attended, x_offsets), [H])) + x
        return out, (v, q, k, out)


class HSTUJagged(Parts):
    def forward(
        self, x: Tensor, x_offsets: Tensor, invalid_attn_mask: Tensor
    ) -> tuple[Tensor, list[Any]]:
        x, states = to_jagged(x, x_offsets), []
        for layer in self._attention_layers:
            x, state = layer(x=x, x_offsets=x_offsets, invalid_attn_mask=invalid_attn_mask)
            states.append(state)
        return to_dense(x, x_offsets), states


class HSTUInput(Parts):
    def forward(
        self, past_lengths: Tensor, past_ids: Tensor, past_embeddings: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        embeddings = self._emb_dropout(past_embeddings * H**0.5 + self._pos_emb(torch.arange(L)))
        valid_mask = (past_ids != 0).unsqueeze(-1).float()
        embeddings *= valid_mask
        return past_lengths, embeddings, valid_mask


class HSTUOutput(Parts):
    def forward(self, output_embeddings: Tensor) -> Tensor:
        return F.normalize(output_embeddings, dim=-1, eps=1e-6)


class HSTUItems(Parts):
    def get_item_embeddings(self, item_ids: Tensor) -> Tensor:
        return self._item_emb(item_ids)


class HSTU(Parts):
    def generate_user_embeddings(self, **past: Tensor) -> Tensor:
        lengths, embeddings, _ = self._input_features_preproc(**past)
        offsets = F.pad(lengths.cumsum(0), (1, 0))
        mask = 1.0 - causal().float()
        embeddings, _ = self._hstu(x=embeddings, x_offsets=offsets, invalid_attn_mask=mask)
        return self._output_postproc(embeddings)

    def encode(self, past_lengths: Tensor, past_ids: Tensor, past_embeddings: Tensor) -> Tensor:
        encoded = self.generate_user_embeddings(
            past_lengths=past_lengths, past_ids=past_ids, past_embeddings=past_embeddings
        )
        return encoded[torch.arange(len(encoded)), past_lengths - 1]


def hstu_model() -> nn.Module:
    def layer() -> nn.Module:
        return HSTULayer(_uvqk=nn.Parameter(torch.empty(H, 4 * H)), _o=linear())

    return HSTU(
        _embedding_module=HSTUItems(_item_emb=nn.Embedding(N + 1, H, padding_idx=0)),
        _input_features_preproc=HSTUInput(
            _pos_emb=nn.Embedding(L, H), _emb_dropout=nn.Dropout(0.2)
        ),
        _hstu=HSTUJagged(_attention_layers=twice(layer)),
        _output_postproc=HSTUOutput(),
    )


@torch.no_grad()
def score_hstu(model: HSTU, histories: Lists) -> Tensor:
    get_item_embeddings = model._embedding_module.get_item_embeddings
    item_embeddings = F.normalize(get_item_embeddings(torch.arange(1, N + 1)), dim=-1)
    past_ids = padded(histories, offset=1, pad=0, left=False)
    past_lengths = (past_ids != 0).sum(1)
    users = model.encode(past_lengths, past_ids, get_item_embeddings(past_ids))
    return users @ item_embeddings.T


HSTU_IDS = TokenIds("_embedding_module._item_emb")
HSTU_LENGTHS = Lengths("_input_features_preproc", select=("past_lengths",))
HSTU_OFFSETS = Lengths("_hstu", select=("x_offsets",), offsets=True)
jagged = partial(Site, layout="jagged", positions_from=HSTU_OFFSETS)
HSTU_CLONE = Clone(
    name="HSTU",
    build=seeded(hstu_model),
    score=score_hstu,
    site=Site("_output_postproc", positions_from=HSTU_LENGTHS),
    head=lambda model, users: (
        users @ F.normalize(model._embedding_module._item_emb.weight[1:], dim=-1).T
    ),
    silent={"": "forward", "_hstu._attention_layers": "ModuleList"},
    real=real_right,
    others=(
        Site("_output_postproc", positions_from=HSTU_IDS),
        Site("_hstu", select=(0,), positions_from=HSTU_OFFSETS),
        jagged("_hstu._attention_layers.-1", select=(0,)),
        jagged("_hstu._attention_layers.1", at="input", select=("x",)),
        jagged("_hstu._attention_layers.0", select=(0,), positions_from=HSTU_IDS),
        jagged("_hstu._attention_layers.0._o", positions_from=HSTU_LENGTHS),
        Site("", method="encode", layout="BH"),
    ),
    written_later=(Site("_input_features_preproc._emb_dropout", positions="all"),),
)


CLONES = (
    *RECBOLE,
    *RECTOOLS,
    *REPLAY,
    GSASREC,
    PMIXER,
    BERT_VAE,
    GRU4REC,
    *HUGGING_FACE,
    HSTU_CLONE,
)
