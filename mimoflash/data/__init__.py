"""Data: documents from sources, without duplicates, tokenised once into shards, mixed and packed into batches."""

from mimoflash.data.encode import is_held_out_document
from mimoflash.data.hidden import HiddenBatch, HiddenRows
from mimoflash.data.loader import Batch, Mixture, PackedLoader
from mimoflash.data.packing import Packing
from mimoflash.data.prepare import Prepared, check_no_leak, open_prepared, prepare
from mimoflash.data.shards import ShardReader, ShardWriter
from mimoflash.data.sources import Document, DomainSource, FolderSource, Source, StdlibSource, read_documents

__all__ = [
    "Batch",
    "Document",
    "DomainSource",
    "FolderSource",
    "HiddenBatch",
    "HiddenRows",
    "Mixture",
    "PackedLoader",
    "Packing",
    "Prepared",
    "ShardReader",
    "ShardWriter",
    "Source",
    "StdlibSource",
    "check_no_leak",
    "is_held_out_document",
    "open_prepared",
    "prepare",
    "read_documents",
]
